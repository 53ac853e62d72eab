"""Work in a process of its own, whose end is looked at."""

import os


def in_a_child(work):
    """What `work()` says, in a process of its own: a crash fails the test."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        word = "ended without a word"
        try:
            word = work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent tells it
            word = f"{type(error).__name__}: {error}"
        finally:
            os.write(write_end, word.encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as words:
        word = words.read()
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFSIGNALED(status), f"ended by signal {os.WTERMSIG(status)}"
    return word or f"ended with a line and status {os.WEXITSTATUS(status)}"
