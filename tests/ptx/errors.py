"""What can be wrong with a kernel. Every message names the instruction, the thread, the address and the buffer, as far as
there is one."""


class PtxError(AssertionError):
    """A kernel does what it must not do."""


class OutOfBounds(PtxError):
    """An access outside of the buffer that its address belongs to, or a store to constants."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of the access."""


class Uninitialized(PtxError):
    """Memory that is read before anything was written to it; a result of which an element was never written."""


class Race(PtxError):
    """Two threads access the same memory, one of them writes, and no barrier lies between."""


class Deadlock(PtxError):
    """Threads wait for others that never come, or come to another barrier."""


class Unsupported(PtxError):
    """An instruction, or a form of one, that the interpreter does not know."""
