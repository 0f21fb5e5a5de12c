"""The exit codes of a command. A job's status is read from them, too.

0: done. 1: it failed. 2: the user must change something. 130: it was interrupted and can be continued.
"""

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
