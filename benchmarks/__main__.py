"""The command line: ``python -m benchmarks [part [names]] [options]``; without a part, everything."""

from benchmarks.command import main

if __name__ == "__main__":
    main()
