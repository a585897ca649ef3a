"""Options of the test command."""


def pytest_addoption(parser):
    group = parser.getgroup("jitgrad")
    group.addoption("--programs", type=int, default=2160, metavar="N",
                    help="how many random programs test_programs.py draws (default: 2160)")
    group.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")
