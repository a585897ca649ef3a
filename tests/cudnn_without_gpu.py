"""Builds plans of the real cuDNN without a GPU: ``python cudnn_without_gpu.py < questions.json``, for tests.

In goes a list of [capability, kind, fields of an `Attended` or `Convolved`], out comes a list with the bytes of workspace of
the plan of each, or what the library said. The library compiles for a device that is described to it, an A100 or H100; its
kernels are loaded by a driver that has no device and loads anything (`DRIVER`, in C, to be built as libcuda.so.1)."""

import json
import sys
from types import SimpleNamespace

REFUSED = """cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuDeviceGet cuDeviceGetCount cuDriverGetVersion
cuGetErrorName cuGetErrorString cuInit cuLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx cuLibraryLoadFromFile
cuLinkAddData cuLinkComplete cuLinkCreate cuLinkDestroy cuStreamGetCtx cuTensorMapEncodeIm2col cuTensorMapEncodeTiled"""
DONE = "cuKernelSetAttribute cuLibraryUnload cuModuleUnload"
GIVING = "cuKernelGetFunction cuLibraryGetKernel cuLibraryLoadData cuModuleGetFunction cuModuleLoadData"
COUNTING = "cuKernelGetAttribute cuOccupancyMaxPotentialClusterSize"
BODIES = {REFUSED: "(void) { return 100; }", DONE: "(void) { return 0; }",
          GIVING: "(void **p) { *p = (void *)4096; return 0; }", COUNTING: "(int *n) { *n = 8; return 0; }"}
DRIVER = "\n".join([f"int {name}{body}" for names, body in BODIES.items() for name in names.split()]) + "\n"

H100 = {"maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
        "multiProcessorCount": 132, "smCountOrigin": 0, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
        "maxSharedMemoryPerBlockOptin": 232448, "oversizedSharedMemoryPerBlock": 0, "reservedSharedMemoryPerBlock": 1024,
        "maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
        "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 85029158912,
        "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "memoryBusWidth": 5120, "l2CacheSize": 52428800,
        "cudaDeviceId": 0, "deviceVer": 900, "driverVer": 13000, "deviceName": "NVIDIA H100 80GB HBM3"}
DEVICES = {90: H100, 80: {**H100, "deviceVer": 800, "multiProcessorCount": 108, "maxSharedMemoryPerBlockOptin": 166912,
                          "l2CacheSize": 41943040, "smClockRateKHz": 1410000, "deviceName": "NVIDIA A100-SXM4-80GB"}}
DEVICE, CHAR, JSON = 38, 24, 2702                           # a descriptor, a type and an attribute of cudnn_graph.h


def main():
    import ctypes

    from jitgrad.products import ATTENDED, Attended, Convolved
    from jitgrad.runtime.cuda import cudnn, cudnn_attention, cudnn_descriptors
    from jitgrad.runtime.cuda.libraries import LibraryError

    found = cudnn.library()
    cudnn_descriptors.ELEMENTS[CHAR] = ctypes.c_char
    found.handle = lambda gpu: 0

    class Drafted(cudnn.Plan):
        """A plan for a described device."""

        def _aim(self, made, kind):
            attribute = {cudnn.HEURISTICS: 204, cudnn.PLAN: 407}.get(kind)
            if attribute:
                made.set(attribute, cudnn.DESCRIPTOR, device)

    answers = []
    for capability, kind, fields in json.load(sys.stdin):
        device = cudnn.Descriptor(found, DEVICE)
        device.set(JSON, CHAR, *[bytes([b]) for b in json.dumps(DEVICES[capability]).encode() + b"\0"])
        device.finalize()
        gpu = SimpleNamespace(total_memory=80 << 30, major=capability // 10)
        given = {name: tuple(value) if type(value) is list else value for name, value in fields.items()}
        asked = (Attended if kind in ATTENDED else Convolved)(kind=kind, **given)
        assert not isinstance(asked, Attended) or cudnn_attention.is_known(found, gpu, asked)
        try:
            answers.append(Drafted(found, gpu, asked).workspace)
        except LibraryError as error:
            answers.append(str(error))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
