"""Defines the exit status of a training process, for whoever started it: a person, torchrun, Slurm, Kubernetes."""

FINISHED = 0
FAILED = 1  # Any other error: another rank has died, the loss is not finite. Starting again may help.
MISTAKE = 2  # The options or the data are wrong. Starting again would fail again.
NO_FILE_ACCESS = 74
"""A file could not be read or written (sysexits.h: EX_IOERR): disk full, read-only, file system gone."""
STOPPED = 75
"""SIGTERM or SIGHUP asked to stop, and the run has saved (sysexits.h: EX_TEMPFAIL). Start the same command again."""
HUNG = 124  # There was no progress for TrainConfig.hang_timeout_s. timeout(1) has the same status.
INTERRUPTED = 130  # Ctrl-C asked to stop, and the run has saved. Shells have the same status (128 + SIGINT).

MEANINGS = {
    FINISHED: "finished",
    FAILED: "failed",
    MISTAKE: "mistake in the options or the data",
    NO_FILE_ACCESS: "a file could not be read or written",
    STOPPED: "asked to stop; start it again",
    HUNG: "hung",
    INTERRUPTED: "interrupted",
}


class LossNotFinite(ValueError):
    """Names rank, step and the last good checkpoint. It ends with FAILED, and not as other ValueErrors with MISTAKE."""
