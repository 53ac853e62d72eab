"""A network link made by the test: two network namespaces joined by a program that forwards packets, or does not.

Run as `link.py` by the test, as root, in a namespace of its own; commands come on stdin, one a line:
`delay SECONDS`, `drop FRACTION`, `cut`, `mend`. It answers each with `ok`, and with `ready` when the link is up.

A queueing discipline (netem) would do the same in the kernel, where the kernel has it; a tun device is everywhere.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
CLONE_NEWNET = 0x40000000


def enter_new_namespace():
    """Move this process to a network namespace of its own; raises OSError where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def open_tun(name, address, peer):
    """A point-to-point device in this namespace; its file descriptor gives and takes IP packets."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    for words in (f"addr add {address} peer {peer} dev {name}", f"link set {name} mtu 9000 up", "link set lo up"):
        subprocess.run(["ip", *words.split()], check=True)
    return device


class Link:
    """Forwards packets between two devices."""

    def __init__(self, devices):
        self.devices = devices
        self.delay_s = 0.0
        self.drop = 0.0
        self.is_cut = False
        self.waiting = []
        self.random = random.Random(1)
        self.counts = {"forwarded": 0, "dropped": 0}

    def command(self, line):
        word, *value = line.split()
        if word == "delay":
            self.delay_s = float(value[0])
        elif word == "drop":
            self.drop = float(value[0])
        elif word in {"cut", "mend"}:
            self.is_cut = word == "cut"
        print("ok", *self.counts.values(), flush=True)

    def take(self, device):
        """One packet from a device: dropped, or to be given to the other when its time has come."""
        packet = os.read(device, 65536)
        if self.is_cut or self.random.random() < self.drop:
            self.counts["dropped"] += 1
            return
        to = self.devices[1 - self.devices.index(device)]
        heapq.heappush(self.waiting, (time.monotonic() + self.delay_s, self.counts["forwarded"], to, packet))
        self.counts["forwarded"] += 1

    def give(self):
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(self.waiting)
            os.write(to, packet)

    def run(self):
        commands = os.fdopen(0, buffering=1)
        while True:
            wait_s = max(self.waiting[0][0] - time.monotonic(), 0) if self.waiting else None
            readable, _, _ = select.select([*self.devices, commands], [], [], wait_s)
            if commands in readable:
                line = commands.readline()
                if not line:
                    return
                self.command(line)
            for device in self.devices:
                if device in readable:
                    self.take(device)
            self.give()


def main():
    """`link.py SERVER_ARGV -- CLIENT_ARGV`: both programs, each in its namespace: 10.0.0.1 and 10.0.0.2."""
    arguments = sys.argv[1:]
    at = arguments.index("--")
    devices, programs = [], []
    for number, command in enumerate((arguments[:at], arguments[at + 1 :]), 1):
        enter_new_namespace()
        devices.append(open_tun(f"edm{number}", f"10.0.0.{number}", f"10.0.0.{3 - number}"))
        # A program stays in the namespace it was started in; the devices' descriptors work from any.
        programs.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    print("ready", *(program.pid for program in programs), flush=True)
    try:
        Link(devices).run()
    finally:
        for program in programs:
            program.kill()
            program.wait()


if __name__ == "__main__":
    main()
