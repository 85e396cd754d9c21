"""`python -m tests.helpers.without A,B CODE ARGUMENTS`: runs Python code where A and B cannot be imported."""

import sys

missing, code, *arguments = sys.argv[1:]
early = {name for name in missing.split(",") if name in sys.modules}
assert not early, f"{early} were imported before they could be taken away"
sys.modules.update(dict.fromkeys(missing.split(",")))
sys.argv = ["-c", *arguments]
exec(code, {"__name__": "__main__"})
