"""What the exit status of a training process says to whoever started it: a person, torchrun, Slurm, Kubernetes."""

FINISHED = 0
FAILED = 1
"""Anything else: another rank has died, the loss is not finite. Starting again may help."""
MISTAKE = 2
"""In the options or the data. Starting again repeats it."""
NO_FILE_ACCESS = 74
"""A file could not be read or written (sysexits.h: EX_IOERR): disk full, read-only, file system gone."""
STOPPED = 75
"""Asked to stop by SIGTERM or SIGHUP, and saved (sysexits.h: EX_TEMPFAIL): start the same command again."""
HUNG = 124
"""No progress for TrainConfig.hang_timeout_s; as of timeout(1)."""
INTERRUPTED = 130
"""Asked to stop by Ctrl-C, and saved; as of a shell (128 + SIGINT)."""

MEANINGS = {
    FINISHED: "finished",
    FAILED: "failed",
    MISTAKE: "mistake in the options or the data",
    NO_FILE_ACCESS: "a file could not be read or written",
    STOPPED: "asked to stop; start it again",
    HUNG: "hung",
    INTERRUPTED: "interrupted",
}
