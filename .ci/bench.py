#!/usr/bin/env python3
"""Measure cmux_ssh.py next to plain ssh and ssh over a master, in turns, in one run.

    python .ci/bench.py              against a throwaway sshd on this machine
    python .ci/bench.py HOST         against a host of the ssh config
    python .ci/bench.py --rtt 50     the throwaway sshd behind a line of 50 ms there and back
    python .ci/bench.py --quick      a quarter of the runs, 200 files instead of 1,000 of 16 kB, 33 MB instead of 262
    python .ci/bench.py --json       one JSON document instead of the table

A ratio compares medians: with ssh over a master where that row has one, else with plain ssh. A bar is
the goal that the design set for it; "MISSED" is a result, not an error. Run it with TMPDIR on a RAM
disk: on a real disk, unpacking the same thousand files was seen to take 80 to 700 ms by chance.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import queue
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "cmux_ssh.py")
sys.path.insert(0, os.path.dirname(HERE))
import cmux_ssh  # noqa: E402

FILE_SIZE = 16 * 1024       # hexadecimal, so that a file compresses by half, as source code does
PAUSE = 0.06                # between warm calls, as an agent has it: sessions are opened ahead in it
TEN_KB = b"0123456789abcde\n" * 640

# relay.py SECONDS PROGRAM...: runs the program at the end of a line with this round trip. Bytes wait
# for their time; more than 4 MB under way stop the sender, as a window does.
RELAY = r"""
import collections, os, select, socket, subprocess, sys, time
near, far = socket.socketpair()
subprocess.Popen(sys.argv[2:], stdin=far, stdout=far, start_new_session=True)
far.close()
delay, towards, back = float(sys.argv[1]) / 2, collections.deque(), collections.deque()
ways = {0: (towards, near.fileno()), near.fileno(): (back, 1)}

def takes_more(queued):
    ended = queued and not queued[-1][1]
    return not ended and sum(len(data) for _, data in queued) < 1 << 22

while ways:
    due = [queued[0][0] for queued, _ in ways.values() if queued]
    wait = max(0, min(due) - time.monotonic()) if due else None
    readable = [fd for fd, (queued, _) in ways.items() if takes_more(queued)]
    for fd in select.select(readable, [], [], wait)[0]:
        ways[fd][0].append((time.monotonic() + delay, os.read(fd, 1 << 16)))
    for fd, (queued, target) in list(ways.items()):
        while queued and queued[0][0] <= time.monotonic():
            data = queued.popleft()[1]
            if not data:
                del ways[fd]
                if fd:
                    sys.exit()
                near.shutdown(socket.SHUT_WR)
            while data:
                data = data[os.write(target, data):]
"""


class Spread:
    """What one contender took: the median and the quartiles, in the row's unit."""

    def __init__(self, values):
        ranked = sorted(values)
        self.median = ranked[len(ranked) // 2]
        self.low, self.high = ranked[len(ranked) // 4], ranked[len(ranked) * 3 // 4]
        self.runs = len(ranked)


class Row:
    """One kind of work. `by` maps "plain", "master" and "cmux" to a Spread. The bar is None or
    (number, kind): "x" is a ratio, "RT" round trips of a simulated line, else the row's own unit."""

    def __init__(self, work, unit, by, bar=None, rtt=0.0):
        self.work, self.unit, self.by, self.bar = work, unit, by, bar
        ours, other = by["cmux"].median, by.get("master") or by.get("plain")
        self.ratio = ours / other.median if other else None
        if bar and bar[1] == "RT":
            self.ratio = ours / (rtt * 1000)
        measured = self.ratio if bar and bar[1] in ("x", "RT") else ours
        more_is_better = unit.endswith("/s")
        self.reached = None if not bar else measured >= bar[0] if more_is_better else measured <= bar[0]

    def as_dict(self):
        return dict(vars(self), by={name: vars(spread) for name, spread in self.by.items()})

    def cells(self, wide):
        cells = [self.work]
        for name in ("plain", "master", "cmux"):
            cells.append(self.cell(self.by[name], wide) if name in self.by else "")
        trips = self.bar and self.bar[1] == "RT"
        cells.append("" if self.ratio is None else f"{self.ratio:.2f} {'RT' if trips else 'x'}")
        bar = f"{self.bar[0]:g} {self.bar[1]} " if self.bar and wide else ""
        cells.append(bar + ("" if self.reached is None else "ok" if self.reached else "MISSED"))
        return cells

    def cell(self, spread, wide):
        digits = 0 if spread.median >= 100 else 1 if spread.median >= 10 else 2
        quartiles = f" ({spread.low:.{digits}f}-{spread.high:.{digits}f})" if wide else ""
        return f"{spread.median:.{digits}f} {self.unit}{quartiles}"


def git(directory, *words):
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
    subprocess.run(["git", "-C", directory, *identity, *words], check=True, stdout=subprocess.DEVNULL)


def make_repository(directory, files):
    for number in range(files):
        path = os.path.join(directory, f"{number // 50:03d}", f"{number:03d}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as stream:
            stream.write(os.urandom(FILE_SIZE // 2).hex())
    git(directory, "init", "-q")
    git(directory, "add", ".")
    git(directory, "commit", "-q", "-m", "base")


class Bench:
    """The contenders against one host. `rtt`, in seconds, is that of a simulated line, else 0."""

    def __init__(self, host, place, rtt, quick):
        self.host, self.place, self.rtt, self.quick = host, place, rtt, quick
        self.root, self.roots = "cmux-bench-" + os.urandom(4).hex(), itertools.count()
        self.files = 200 if quick else 1000
        self.bulk_size = (3200 if quick else 25600) * len(TEN_KB)
        ssh, control = shlex.split(os.environ.get("CMUX_SSH_COMMAND", "ssh")), os.path.join(place, "control")
        self.fresh = [*ssh, "-S", "none", host]
        self.over = [*ssh, "-S", control, host]
        self.master = [*ssh, "-S", control, "-o", "ControlPersist=3600", "-M", "-N", "-f", host]
        self.end_master = [*ssh, "-S", control, "-O", "exit", host]

    def open(self):
        subprocess.run(self.master, check=True, stdin=subprocess.DEVNULL)
        self.tree = os.path.join(self.place, "tree")
        make_repository(self.tree, self.files)
        self.bulk, self.ten = os.path.join(self.place, "bulk"), os.path.join(self.place, "ten")
        for path, size in ((self.bulk, self.bulk_size), (self.ten, len(TEN_KB))):
            with open(path, "wb") as stream:
                for _ in range(0, size, len(TEN_KB)):
                    stream.write(TEN_KB)
        self.project = cmux_ssh.Project(self.tree)

    def close(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ssh(self.over, f"rm -rf {self.root}")
        subprocess.run(self.end_master, stderr=subprocess.DEVNULL, check=False)
        cmux_ssh.end_masters()

    # -- one contender, once --

    def ssh(self, argv, command, stdin=subprocess.DEVNULL):
        """A session that the server refuses, as 10 at once bring about, goes over a connection of its own."""
        subprocess.run([*argv, command], stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    def ssh_with(self, command, path):
        with open(path, "rb") as stream:
            self.ssh(self.over, command, stream)

    def new_root(self):
        return f"{self.root}/{next(self.roots)}"

    def archive_over_ssh(self, then=""):
        root = self.new_root()
        archive = subprocess.Popen(["git", "-C", self.tree, "archive", "HEAD"], stdout=subprocess.PIPE)
        self.ssh(self.fresh, f"mkdir -p {root} && tar -xf - -C {root} && cd {root}{then}", archive.stdout)
        archive.communicate()

    def repository_over_ssh(self):
        """The files and the repository of one commit that a new workspace has, too, by hand."""
        self.archive_over_ssh(" && git init -q && git add -A && git -c user.name=b -c user.email=b commit -qm base")

    def new_workspace(self, root):
        self.project.create("w" + os.urandom(4).hex(), self.host, root=root)

    def new_with_repository(self):
        workspace = self.project.create("w" + os.urandom(4).hex(), self.host, root=self.new_root())
        workspace.exec(["git", "status"])

    def cold_exec(self):
        """Milliseconds from nothing to the end of one call: a new state directory has no masters."""
        home = os.environ["CMUX_SSH_HOME"]
        os.environ["CMUX_SSH_HOME"] = os.path.join(self.place, "cold-" + os.urandom(4).hex())
        try:
            began = time.perf_counter()
            cmux_ssh.Host(self.host, warm=0)._call("operation() { :; }\n")
            return (time.perf_counter() - began) * 1000
        finally:
            cmux_ssh.end_masters()
            os.environ["CMUX_SSH_HOME"] = home

    def program(self, *words, module=False):
        """Start the program as a person does, as a script or, compiled once, by -m."""
        start = ["-m", "cmux_ssh"] if module else [PROGRAM]
        subprocess.run([sys.executable, *start, *words], cwd=os.path.dirname(PROGRAM), check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    # -- rows --

    def row(self, work, unit, times, bar, contenders, pause=0.0):
        """Run the contenders in turns, in another order each time. A float that one returns counts
        instead of the seconds it took. Where the unit ends in /s, more is better."""
        taken = {name: [] for name in contenders}
        for _ in range(max(3, times // (4 if self.quick else 1))):
            for name in random.sample(sorted(contenders), len(contenders)):
                began = time.perf_counter()
                value = contenders[name]()
                if not isinstance(value, float):
                    value = (time.perf_counter() - began) * (1000 if unit == "ms" else 1)
                taken[name].append(value)
                time.sleep(pause)
        return Row(work, unit, {name: Spread(values) for name, values in taken.items()}, bar, self.rtt)

    def rows(self):
        yield self.row("first command, connection included", "ms", 6, None, {
            "plain": lambda: self.ssh(self.fresh, "true"), "cmux": self.cold_exec})
        yield from self.workspace_rows()
        yield from self.warm_rows()
        yield from self.program_rows()
        yield from self.many_rows()
        yield self.row("upload to stdin", "MB/s", 5, None, {
            "master": lambda: self.rate(lambda: self.ssh_with("cat >/dev/null", self.bulk)),
            "cmux": lambda: self.rate(self.upload)})
        yield self.pull_row()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        yield Row("peak memory of this process", "MB", {"cmux": Spread([peak])}, (64, "MB"))

    def workspace_rows(self):
        yield self.row("new workspace", "ms", 5, (1.5, "x"), {
            "plain": self.archive_over_ssh, "cmux": lambda: self.new_workspace(self.new_root())})
        yield self.row("the same, until git works in it", "ms", 5, (0.9, "x"), {
            "plain": self.repository_over_ssh, "cmux": self.new_with_repository})
        self.workspace = self.project.create("bench", self.host, root=self.new_root())
        path = shlex.quote(self.workspace.path)
        yield self.row("second workspace of the same commit", "ms", 5, (1.2, "x"), {
            "master": lambda: self.ssh(self.over, f"cp -a {path} {self.new_root()}"),
            "cmux": lambda: self.new_workspace(self.workspace.root)})
        seconds, kilobytes = zip(*(self.push_one_change() for _ in range(3)))
        yield Row("one changed file, sent by push", "kB", {"cmux": Spread(kilobytes)}, (50, "kB"))
        yield Row("the same, python3 -m cmux_ssh push", "ms", {"cmux": Spread(seconds)}, (250, "ms"))

    def push_one_change(self):
        with open(os.path.join(self.tree, "000", "000"), "a") as stream:
            stream.write(f"changed {time.time()}\n")
        git(self.tree, "commit", "-qam", "change")
        began = time.perf_counter()
        self.program("push", "-C", self.tree, "-w", "bench", module=True)
        taken = (time.perf_counter() - began) * 1000
        pushes = [row for row in self.project.history.rows() if row["operation"] == "push"]
        return taken, pushes[-1]["bytes"] / 1000

    def warm_rows(self):
        pause, space, times = max(PAUSE, self.rtt * 3), self.workspace, 20 if self.rtt else 40
        space.write("ten", TEN_KB)
        path = shlex.quote(f"{space.path}/ten")
        changes = itertools.cycle((("e\n", "f\n"), ("f\n", "e\n")))
        exec_bar = (1.1, "RT") if self.rtt else (0.45, "x")

        def edit_by_ssh():
            self.ssh(self.over, f"cat {path}")
            self.ssh_with(f"cat >{path}.p", self.ten)

        def edit():
            old, new = next(changes)
            space.edit("ten", [{"old": old, "new": new, "count": 640}])

        for work, bar, plain, ours in (
                ("exec of an argv", exec_bar, lambda: self.ssh(self.over, "/bin/true"), lambda: space.exec(["/bin/true"])),
                ("exec of a shell line", None, lambda: self.ssh(self.over, "true"), lambda: space.exec("true")),
                ("read 10 kB", None if self.rtt else (0.4, "x"), lambda: self.ssh(self.over, f"cat {path}"), lambda: space.read("ten")),
                ("write 10 kB", None, lambda: self.ssh_with(f"cat >{path}.p", self.ten), lambda: space.write("ten", TEN_KB)),
                ("edit (plain: read, then write)", None, edit_by_ssh, edit)):
            yield self.row(work, "ms", times, bar, {"master": plain, "cmux": ours}, pause)
        yield self.mcp_row(times, pause)

    def mcp_row(self, times, pause):
        """From the line of a tools/call to that of its answer, in this process."""
        requests, answers = queue.Queue(), queue.Queue()
        server = cmux_ssh.McpServer(self.project, "bench", self.host, lambda data, ending: answers.put(data),
                                    False, cmux_ssh.MCP_SOFT)
        threading.Thread(target=server.run, args=(iter(requests.get, b""),), daemon=True).start()
        call = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "exec", "arguments": {"command": ["/bin/true"]}}}).encode()

        def ours():
            requests.put(call)
            answer = answers.get(timeout=60)
            if b"exit_code: 0" not in answer:
                raise SystemExit(f"A call through the MCP server failed: {answer!r}")
        row = self.row("exec of an argv, through MCP", "ms", times, None, {
            "master": lambda: self.ssh(self.over, "/bin/true"), "cmux": ours}, pause)
        requests.put(b"")
        return row

    def program_rows(self):
        """Next to ssh over a master and starting Python, as any program in Python must."""
        words = ("exec", "-n", "-C", self.tree, "-w", "bench", "--", "true")

        def plain():
            self.ssh(self.over, "true")
            subprocess.run([sys.executable, "-c", "pass"], check=True)
        yield self.row("python3 cmux_ssh.py exec", "ms", 16, (3.5, "x"), {
            "master": plain, "cmux": lambda: self.program(*words)})
        yield self.row("python3 -m cmux_ssh exec", "ms", 16, (1.8, "x"), {
            "master": plain, "cmux": lambda: self.program(*words, module=True)})

    def many_rows(self):
        """Commands a second: ssh over one master 10-way, as MaxSessions allows; ours 100-way."""
        total, costs, job = 200 if self.quick else 600, [], "sleep 0.05; echo hi"

        def rate(work, count, at_once):
            began = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                for done in [pool.submit(work) for _ in range(count)]:
                    done.result()
            return count / (time.perf_counter() - began)

        def cpu():
            usage = resource.getrusage(resource.RUSAGE_SELF)
            return usage.ru_utime + usage.ru_stime

        def ours():
            before = cpu()
            reached = rate(lambda: self.workspace.exec(["true"]), total, 100)
            costs.append((cpu() - before) * 1000 / total)
            return reached

        def plain(command):
            return rate(lambda: self.ssh(self.over, command), total // 3, 10)
        rate(lambda: self.workspace.exec(["true"]), 100, 100)  # opens the masters
        yield self.row("50 ms each, 100 at once (plain: 10)", "/s", 4, None, {
            "master": lambda: plain(job), "cmux": lambda: rate(lambda: self.workspace.exec(job), total, 100)})
        yield self.row("`true`, 100 at once (plain: 10)", "/s", 4, (1, "x"), {
            "master": lambda: plain("true"), "cmux": ours})
        yield Row("this process's CPU for one of them", "ms", {"cmux": Spread(costs)}, (1, "ms"))

    def rate(self, work):
        began = time.perf_counter()
        work()
        return self.bulk_size / 1e6 / (time.perf_counter() - began)

    def upload(self):
        words = ["exec", "-C", self.tree, "-w", "bench", "--", "sh", "-c", "cat >/dev/null"]
        with open(self.bulk, "rb") as stream:
            subprocess.run([sys.executable, "-m", "cmux_ssh", *words], stdin=stream, check=True, cwd=os.path.dirname(PROGRAM))

    def pull_row(self):
        """150 commits of the agent, brought home to a new branch each time."""
        commits = ("for n in $(seq 150); do echo $n >counter; git add counter; "
                   "git -c user.name=a -c user.email=a@b commit -qm $n; done")
        space = self.project.create("pulled", self.host, root=self.new_root())
        space.exec(commits).check() if hasattr(cmux_ssh.ExecResult, "check") else space.exec(commits)
        numbers = itertools.count()
        return self.row("pull of 150 commits", "ms", 4, (300, "ms"), {
            "cmux": lambda: cmux_ssh.pull(space, f"cmux/pulled-{next(numbers)}")})


def main():
    parser = argparse.ArgumentParser(description="Measure cmux_ssh.py next to plain ssh, in one run.")
    parser.add_argument("host", nargs="?", help="a host of the ssh config; a throwaway sshd unless given")
    parser.add_argument("--quick", action="store_true", help="a quarter of the runs, smaller trees")
    parser.add_argument("--rtt", type=float, default=0, metavar="MS", help="simulate a line to the throwaway sshd")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    if options.rtt and options.host:
        parser.error("--rtt simulates a line to the throwaway sshd: leave out HOST or --rtt")
    with contextlib.ExitStack() as stack:
        place = tempfile.mkdtemp(prefix="cmux-bench-")
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        os.environ["CMUX_SSH_HOME"] = os.path.join(place, "state")
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(place, "pycache")  # -m compiles once, and nothing is left behind
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        if not options.host:
            server = stack.enter_context(cmux_ssh.throwaway_server())
            if options.rtt:
                slow_down(server, options.rtt / 1000)
        bench = Bench(options.host or "demo", place, options.rtt / 1000, options.quick)
        stack.callback(bench.close)
        bench.open()
        show(bench, options)


def slow_down(server, seconds):
    """Put the relay between ssh and the throwaway sshd in the directory ``server``."""
    relay, path = os.path.join(server, "relay.py"), os.path.join(server, "ssh_config")
    with open(relay, "w") as stream:
        stream.write(RELAY)
    with open(path) as stream:
        config = stream.read()
    with open(path, "w") as stream:
        command = f"ProxyCommand {shlex.quote(sys.executable)} -I -S {relay} {seconds:g} "
        stream.write(config.replace("ProxyCommand ", command))


def show(bench, options):
    facts = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "python": platform.python_version(),
             "version": cmux_ssh.__version__, "host": options.host or "throwaway sshd on this machine", "rtt_ms": options.rtt}
    if options.json:
        print(json.dumps({**facts, "rows": [row.as_dict() for row in bench.rows()]}, indent=1))
        return
    line = f", {options.rtt:g} ms there and back" if options.rtt else ""
    print(f"{facts['date']}, {facts['cores']} cores, Python {facts['python']}, {facts['host']}{line}")
    wide = shutil.get_terminal_size().columns >= 125 or not sys.stdout.isatty()
    widths = (38, 19, 22, 22, 9, 14) if wide else (35, 10, 10, 10, 8, 6)
    show_row = functools.partial(show_cells, widths)
    show_row(("MEDIAN (QUARTILES)" if wide else "MEDIAN", "PLAIN SSH", "MASTER", "CMUX_SSH", "RATIO", "BAR"))
    for row in bench.rows():
        show_row(row.cells(wide))
    print("A ratio is to ssh over a master, or to plain ssh where a row has none. A bar is the goal.")


def show_cells(widths, cells):
    print("".join(cell[:width].ljust(width) for cell, width in zip(cells, widths)).rstrip(), flush=True)


if __name__ == "__main__":
    main()
