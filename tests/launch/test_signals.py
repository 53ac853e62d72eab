"""What waiting for signals answers, also when the process that waits is stopped meanwhile."""

import os
import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import signal, sys
from edm.launch.signals import wait_signal
held = (signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, held)
print("waiting", flush=True)
for _ in range(int(sys.argv[1])):
    info = wait_signal(held, float(sys.argv[2]))
    print(info and info.si_signo, flush=True)
"""


@pytest.fixture
def waiting():
    """Start a process that waits for SIGUSR1 or SIGUSR2 `times` times, so many seconds each."""
    processes = []

    def start(times, seconds):
        command = [sys.executable, "-c", WAITS, str(times), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(60)
        process.stdout.close()


def test_one_that_comes_ends_the_waiting(waiting):
    process = waiting(2, 30)
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == f"{int(signal.SIGUSR2)}\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == f"{int(signal.SIGUSR1)}\n"


def test_without_any_the_time_is_over(waiting):
    assert waiting(1, 0.05).communicate(timeout=60)[0] == "None\n"


def test_a_stop_that_outlasts_the_time_is_no_signal(waiting):
    process = waiting(5, 0.1)
    for _ in range(5):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == "None\n"
