"""The tests of cmux_ssh.py: real sshd, real git, real shells, the program run as people run it.

Nothing is mocked. The tests of a process share a throwaway OpenSSH daemon on 127.0.0.1 with stock limits,
each with a project of its own; a test that takes the fixture `site` has a daemon, a home and a state
directory to itself. The program runs as its own process, in an environment in which whatever must not be
called is a trap. What a site started is ended and looked for when it closes. Waiting means polling with a
deadline. A missing program fails with the words that install it; only what needs root skips.
"""

import ast
import atexit
import base64
import contextlib
import errno
import fcntl
import functools
import getpass
import hashlib
import itertools
import json
import os
import pty
import py_compile
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from socket import create_connection
from subprocess import DEVNULL, PIPE
from threading import Event, Thread, Timer
from time import monotonic, sleep

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cmux_ssh as c  # noqa: E402

# A shell starts what it puts into the background with Ctrl-C ignored, and everything would inherit that.
if signal.getsignal(SIGINT) is signal.SIG_IGN:
    signal.signal(SIGINT, signal.default_int_handler)

each = pytest.mark.parametrize
promise = pytest.mark.promise
compat = pytest.mark.compat
slow = pytest.mark.slow
shared_fixture = pytest.fixture(scope="module")
HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "cmux_ssh.py"
PATIENCE = 20.0  # seconds for anything that should take one: slow machines fail late, fast ones never
SHELLS = ("bash", "dash", "zsh", "fish", "tcsh", "ksh", "mksh", "busybox")
BINARY = bytes(range(256)) * 3 + b"\0\xff\xfe no final newline"


# === Rig: programs and processes ===


def program(name, package=""):
    """The path of a program the tests need; without it they fail and say how to get it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        pytest.fail(f"the tests need {name}: install it (Debian: apt-get install {package or name})", pytrace=False)
    return path


def keygen(*words):
    subprocess.run([program("ssh-keygen", "openssh-client"), "-q", *map(str, words)], check=True, stdout=DEVNULL)


def compiled():
    """The words that run the program as Python has compiled it: to compile it at each of some thousand starts would take
    half of all the time. (Others start PROGRAM itself.) Of site-packages it needs none."""
    plain = PROGRAM.name != "cmux_ssh.py" or sys.implementation.name != "cpython"  # tuned by a test; PyPy takes source alone
    return [sys.executable, "-S", str(PROGRAM) if plain else compiled_copy()]


@functools.lru_cache(maxsize=None)
def compiled_copy():
    folder = tempfile.mkdtemp(prefix="cmux-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, PROGRAM.name)
    py_compile.compile(str(PROGRAM), cfile=path, dfile=str(PROGRAM), doraise=True)
    return path


def until(probe, what="", seconds=PATIENCE):
    end = monotonic() + seconds
    while not (answer := probe()):
        assert monotonic() < end, f"not within {seconds:g} s: {what}"
        sleep(0.02)
    return answer


def at_once(workers, act, *items):
    """What act makes of each of the items, so many at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(act, *items))


class Process(namedtuple("Process", "pid ppid cmdline environ")):
    """One row of the process table, as bytes: cmdline with NULs between words, environ likewise."""

    def __repr__(self):
        return f"<{self.pid} of {self.ppid}: {self.cmdline.replace(chr(0).encode(), b' ').decode(errors='replace')[:300]}>"


def slurp(path):
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def digest(data):
    return hashlib.sha256(data).hexdigest()


def pointer(content):
    """What git has in the place of LFS content."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (digest(content).encode(), len(content))


def processes(environ=True, parents=False):
    """Every living process of this machine that we may see; zombies have no cmdline and are left out. Somebody waits for
    most looks: they read no more than is asked for."""
    if not os.path.isdir("/proc/self"):
        return processes_from_ps()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        cmdline = slurp(f"/proc/{pid}/cmdline")
        if cmdline:
            fields = slurp(f"/proc/{pid}/stat").rpartition(b")")[2].split() if parents else []
            found.append(Process(int(pid), int(fields[1]) if fields else 0, cmdline, slurp(f"/proc/{pid}/environ") if environ else b""))
    return found


def processes_from_ps():
    def ps(options):
        return [line.split(None, 2) for line in subprocess.run(["ps", options, "-o", "pid=,ppid=,command="], stdout=PIPE, check=True).stdout.splitlines()]
    whole = {row[0]: row[-1] for row in ps("-axEww")}
    return [Process(int(pid), int(parent), command, whole.get(pid, b"")) for pid, parent, command in (row for row in ps("-axww") if len(row) == 3)]


def running(command):
    """The processes that run exactly this command; not those that only name it, like the shell around it."""
    return [p for p in processes(False) if p.cmdline.replace(b"\0", b" ").strip() == command.encode()]


def naming(text):
    return [p for p in processes(False) if text.encode() in p.cmdline and p.pid != os.getpid()]


def descendants(pid):
    table, family = processes(False, parents=True), {pid}
    while more := {p.pid for p in table if p.ppid in family} - family:
        family |= more
    return [p for p in table if p.pid in family and p.pid != pid]


def ancestors():
    parents, line = {p.pid: p.ppid for p in processes(False, parents=True)}, [os.getpid()]
    while parents.get(line[-1], 0) > 0:
        line.append(parents[line[-1]])
    return line


def spent():
    """Seconds of the processor of all programs that ended here: no busy machine makes them more."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def kill(pid, sig=SIGKILL):
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, sig)


def end_everything_of(directory):
    """SIGKILL to every process that names the directory in its command line or environment."""
    name, spare = os.fsencode(directory), set(ancestors())

    def strike():
        left = [p for p in processes() if (name in p.cmdline or name in p.environ) and p.pid not in spare]
        for process in left:
            kill(process.pid)
        return not left

    until(strike)


@contextmanager
def meanwhile(act):
    """A thread acts again and again."""
    stop = Event()

    def run():
        while not stop.is_set():
            act()
    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def watched(needle):
    """Each look at every command line on this machine for bytes that must stand in none: the processes found."""
    looks = []
    with meanwhile(lambda: looks.append([p for p in processes(False) if needle in p.cmdline])):
        yield looks


# === Rig: a line that can fail ===


class Line:
    """A TCP proxy between ssh and sshd that counts, delays, stalls, cuts and refuses on demand."""

    def __init__(self, target_port):
        self.target_port = target_port
        self.connections = self.up = self.down = 0  # connections seen, bytes towards the host, bytes from it
        self.delay, self.rate = 0.0, float("inf")  # seconds each way; bytes a second each way, of all connections together
        self._free = {"up": 0.0, "down": 0.0}  # when each way has sent what it was given
        self.away = (0, b"")  # so many more connections are told this, and closed
        self.refuse = False  # accept and hang up at once, as a port forwarder with nothing behind it does
        self.cut = {"up": None, "down": None}  # end a connection after so many bytes
        self.trap = None  # after so many bytes more, once
        self.flowing = Event()
        self.flowing.set()
        self._live, self._lock = [], threading.Lock()
        self._door = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._door.getsockname()[1]
        Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                near = self._door.accept()[0]
            except OSError:
                return
            self.connections += 1
            try:
                if self.away[0]:
                    self.away = (self.away[0] - 1, self.away[1])
                    near.sendall(self.away[1])
                    near.close()
                    continue
                if self.refuse:
                    raise OSError("refusing")
                far = create_connection(("127.0.0.1", self.target_port))
            except OSError:
                self._hang_up(near)
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._live += [near, far]
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                pipe = queue.Queue(256)
                Thread(target=self._read, args=(source, pipe), daemon=True).start()
                Thread(target=self._write, args=(sink, source, pipe, way), daemon=True).start()

    def _read(self, source, pipe):
        data = b"?"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            pipe.put((monotonic() + self.delay, data))

    def _write(self, sink, source, pipe, way):
        carried = 0
        while True:
            due, data = pipe.get()
            with self._lock:
                self._free[way] = max(self._free[way], monotonic()) + len(data) / self.rate
                due = max(due, self._free[way])
            sleep(max(0.0, due - monotonic()))
            self.flowing.wait()
            data = self._spring(way, data, sink)
            limit = self.cut[way]
            if limit is not None and carried + len(data) > limit:
                with suppress(OSError):
                    sink.sendall(data[: max(0, limit - carried)])
                self._hang_up(sink)
                self._hang_up(source)
                data = b""
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                self._hang_up(source)
                return
            carried += len(data)
            with self._lock:
                setattr(self, way, getattr(self, way) + len(data))

    def _spring(self, way, data, sink):
        """What is left of the data after a trap that lies in it: what comes before is passed on first."""
        with self._lock:
            if not self.trap or self.trap[0] != way or not data:
                return data
            _, left, action = self.trap
            self.trap = (way, left - len(data), action) if left >= len(data) else None
            if self.trap:
                return data
        with suppress(OSError):
            sink.sendall(data[:left])
        action()
        self.flowing.wait()
        return data[left:]  # never empty: that would be the end of the stream

    def _hang_up(self, end):
        """Hang up with a reset; shutdown first, because a thread may sit in recv on it."""
        with suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def drop(self):
        with self._lock:
            live, self._live = self._live, []
        for end in live:
            self._hang_up(end)

    def stall(self):
        self.flowing.clear()

    def go_on(self):
        self.flowing.set()

    def close(self):
        self.go_on()
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.drop()


PORTS = iter(range(1 << 60))


def free_port():
    """A port nobody listens on, and nobody else will: of twenty that are this process's own among the test's, below
    those that the kernel hands out (else another test may get what this one calls closed)."""
    for turn in PORTS:
        with socket.socket() as probe:
            with suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", 10000 + os.getpid() % 1100 * 20 + turn % 20))
                return int(probe.getsockname()[1])
    raise AssertionError


def answers(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# === Rig: hosts ===

# What each shell reads before a command; the noise is there to be ignored. The shells without a file are
# made noisy by the script that stands in for the login.
RC = {
    "bash": (".bashrc", "echo noise-of-bash; echo noise-of-bash >&2\n"),
    "zsh": (".zshenv", "echo noise-of-zsh; echo noise-of-zsh >&2\n"),
    "fish": (".config/fish/config.fish", "echo noise-of-fish; echo noise-of-fish >&2\n"),
    "tcsh": (".tcshrc", 'echo noise-of-tcsh; sh -c "echo noise-of-tcsh >&2"\n'),
}

# Commands a host without GNU, git, bash, Python, setsid, timeout, base64 and sha256sum still has.
POSIX = """[ ash awk basename cat chgrp chmod chown cksum cmp cp cut date dd df diff dirname du echo env expand expr false find
fold grep head id kill ln ls mkdir mkfifo mktemp mv nl nohup od paste printf ps pwd readlink rm rmdir sed sh sleep sort split
stty tail tar tee test touch tr true tty uname uniq wc which xargs""".split()


Keys = namedtuple("Keys", "host user stranger other_host")


def public(key):
    return " ".join(Path(f"{key}.pub").read_text().split()[:2])


class Answer(namedtuple("Answer", "argv code out err seconds")):
    """How a run of the program ended."""

    ended = property(lambda self: self[1:4])
    text = property(lambda self: self.out.decode())
    said = property(lambda self: self.err.decode(errors="replace"))
    rows = property(lambda self: list(map(json.loads, self.out.splitlines())))

    @property
    def json(self):
        assert self.out.isascii()
        return json.loads(self.out)

    def __repr__(self):
        return f"<{' '.join(map(shlex.quote, self.argv))}: {self.code} after {self.seconds:.2f} s\nout {self.out[-2000:]!r}\nerr {self.err[-2000:]!r}>"


class Child(subprocess.Popen):
    """The program at work. A traceback is a failure whatever the test expects."""

    def say(self, data):
        self.stdin.write(data)
        self.stdin.flush()

    def communicate(self, data=None, timeout=60):
        out, err = super().communicate(data, timeout)
        assert b"Traceback" not in (out or b"") + (err or b""), (self.args, out, err)
        return out, err

    def end(self, data=None, seconds=60):
        began = monotonic()
        try:
            out, err = self.communicate(data, seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, SIGKILL)
            raise AssertionError(f"still running after {seconds:g} s: {self.args}, {self.communicate()}") from None
        answer = Answer(self.args, self.returncode, out or b"", err or b"", monotonic() - began)
        print(answer)  # which pytest shows where a test fails
        return answer


class Site:
    """One laptop and its hosts: a local home, a state directory, an ssh config, daemons; all below one directory."""

    def __init__(self, keys):
        self.keys = keys
        self.dir = Path(tempfile.mkdtemp(prefix="cmux-t", dir="/tmp")).resolve()
        self.home, self.state, self.tmp, self.remote = (self.dir / n for n in ("home", "state", "tmp", "far"))
        for directory in (self.home, self.tmp, self.remote):
            directory.mkdir()
        self.config, self.known_hosts = self.dir / "config", self.dir / "known_hosts"
        self.known_hosts.write_text(f"rig {public(keys.host)}\n")
        (self.dir / "authorized").write_text(f"{public(keys.user)}\n")
        (self.home / ".gitconfig").write_text("[user]\n\tname = Ada Test\n\temail = ada@laptop.example\n[init]\n\tdefaultBranch = main\n")
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.tmp), "LANG": "C.UTF-8", "TERM": "dumb",
            "USER": getpass.getuser(), "LOGNAME": getpass.getuser(), "SHELL": "/bin/sh",
            "CMUX_SSH_COMMAND": f"ssh -F {self.config}", "CMUX_SSH_HOME": str(self.state),
            "GIT_CONFIG_GLOBAL": str(self.home / ".gitconfig"), "GIT_CONFIG_NOSYSTEM": "1", "PYTHONDONTWRITEBYTECODE": "1",
            # Nothing may ask, edit or page:
            "GIT_EDITOR": "false", "EDITOR": "false", "VISUAL": "false", "GIT_PAGER": "false", "PAGER": "false",
            "SSH_ASKPASS": "/bin/false", "GIT_ASKPASS": "/bin/false", "GIT_SSH_COMMAND": "false",
        }
        self.entries = []
        self.lines = []
        self.daemons = []
        self.port = 0
        self.ports = {}
        self._write_config()

    # -- hosts

    def host(self, name, *config):
        """Add an entry to the ssh config; the keys and known hosts of the rig stand below it."""
        self.entries.insert(0, f"Host {name}\n" + "".join(f"  {line}\n" for line in config))
        self._write_config()
        return name

    def trusted(self):
        """For an entry bare-*, which has nothing of the rig's: its known hosts."""
        return [f"UserKnownHostsFile {self.known_hosts}", "HostKeyAlias rig"]

    def at(self, name, port=None, *config):
        """A host that is a port of this machine: that of the first daemon, unless another is given."""
        return self.host(name, "HostName 127.0.0.1", f"Port {port or self.port}", *config)

    def _write_config(self):
        common = (f"Host * !bare-*\n  User {getpass.getuser()}\n  IdentityFile {self.keys.user}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile /dev/null\n  HostKeyAlias rig\n"
            "  StrictHostKeyChecking yes\n")
        self.config.write_text("\n".join(self.entries) + "\n" + common)

    def sshd_config(self, name, *lines, shell="", env=None, host_key=None):
        """A configuration for sshd with stock limits, whose sessions live in a home of their own. (With sntrup761, ssh 9.2
        spends 0.12 s of the processor on each connection, a seventh of all the time that the tests take.)"""
        home = self.far_home(name)
        home.mkdir(exist_ok=True)
        variables = {"HOME": str(home), "CMUX_TEST_SITE": str(self.dir), **(env or {})}
        if shell:
            variables["SHELL"] = program(shell)
        text = [f"HostKey {host_key or self.keys.host}", f"AuthorizedKeysFile {self.dir / 'authorized'}", "PidFile none", "UsePAM no",
            "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
            "KexAlgorithms curve25519-sha256", "LogLevel VERBOSE", "SetEnv " + " ".join(f'"{k}={v}"' for k, v in variables.items()), *lines]
        if shell:
            text.append(f"ForceCommand {self._login(name, shell, home)}")
        path = self.dir / f"sshd-{name}"
        path.write_text("\n".join(text) + "\n")
        return path

    def _login(self, name, shell, home):
        """A script that does what sshd does with that login shell: SHELL -c COMMAND; and the noise."""
        path, words = self.dir / f"login-{name}", program(shell) + (" sh" if shell == "busybox" else "")
        text = f'#!/bin/sh\n[ -n "$SSH_ORIGINAL_COMMAND" ] || exec {words} -l\nexec {words} -c "$SSH_ORIGINAL_COMMAND"\n'
        if shell in RC:
            rc = home / RC[shell][0]
            rc.parent.mkdir(parents=True, exist_ok=True)
            rc.write_text(RC[shell][1])
        else:
            text = text.replace("\nexec", f"\necho noise-of-{shell}; echo noise-of-{shell} >&2\nexec", 1)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def first(self, text, by=""):
        """What sshd is told, so that a session does this first, and begins by that program."""
        return "ForceCommand " + self.script(f"first-{os.urandom(4).hex()}", f'{text}\nexec {by} sh -c "$SSH_ORIGINAL_COMMAND"')

    def far_home(self, name="box"):
        return self.remote / name

    def inetd(self, name, *lines, config=(), **options):
        """A host without port or daemon: each connection is an `sshd -i` behind ProxyCommand."""
        path = self.sshd_config(name, *lines, **options)
        return self.host(name, f"ProxyCommand {program('sshd', 'openssh-server')} -i -f {path} -E {self.dir}/log-{name}", *config)

    def login(self, shell):
        """The host whose account has this login shell, made when it is first asked for."""
        return f"box-{shell}" if (self.dir / f"login-box-{shell}").exists() else self.inetd(f"box-{shell}", shell=shell)

    def daemon(self, name, *lines, config=(), **options):
        self.sshd_config(name, *lines, **options)
        for _ in range(5):
            port = free_port()
            if self.listen(name, port):
                break
        else:
            pytest.fail(f"sshd does not start: {self.log(name)}")
        self.port = self.port or port
        self.ports[name] = port
        return self.at(name, port, *config)

    def listen(self, name, port):
        """The daemon of that name, started on a port; None if somebody has it."""
        with open(self.dir / f"log-{name}", "ab") as log:
            child = subprocess.Popen([program("sshd", "openssh-server"), "-D", "-e", "-f", str(self.dir / f"sshd-{name}"), "-p", str(port),
                "-o", "ListenAddress=127.0.0.1"], stdin=DEVNULL, stdout=log, stderr=log, cwd="/")
        until(lambda: child.poll() is not None or answers(port))
        if child.poll() is not None:
            return None
        self.daemons.append(child)
        return child

    def restart(self, name="box"):
        """The listener and what it has forked for connections killed, and another on the same port."""
        for daemon in self.daemons:
            for process in descendants(daemon.pid):
                if process.cmdline.startswith(b"sshd") or b"sshd-session" in process.cmdline:
                    kill(process.pid)
            daemon.kill()
            daemon.wait()
        until(lambda: self.listen(name, self.ports[name]))

    def line(self, name, *config, to="box"):
        """A host of that name which is `box` (or another daemon) behind a line that can fail."""
        line = Line(self.ports[to])
        self.lines.append(line)
        self.at(name, line.port, *config)
        return line

    def log(self, name="box"):
        return slurp(self.dir / f"log-{name}").decode(errors="replace")

    # -- running

    def script(self, name, text):
        """A program of sh, in place of what has that path below the directory."""
        path = self.dir / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        return str(script(path, text))

    def environment(self, env=None):
        return {**self.env, **(env or {})}

    def ssh(self, host, command, *options, stdin=None, env=None):
        return subprocess.run([program("ssh", "openssh-client"), "-F", str(self.config), "-o", "BatchMode=yes", *options, host, command],
            input=stdin, stdin=DEVNULL if stdin is None else None, capture_output=True, env=self.environment(env), timeout=60)

    def start(self, line="", *words, cwd=None, env=None, stdin=DEVNULL, sh=""):
        """The program, left running, in a process group of its own like a job of a shell; or started by a line of sh as "$@".
        Each word is an argument; the first may be several."""
        return Child([*(["sh", "-c", sh, "sh"] if sh else []), *compiled(), *line.split(), *words], cwd=cwd or self.dir, env=self.environment(env), stdin=stdin,
            stdout=PIPE, stderr=PIPE, start_new_session=True)

    def cli(self, *args, stdin=None, seconds=60, **options):
        return self.start(*args, stdin=DEVNULL if stdin is None else PIPE, **options).end(stdin, seconds)

    def masters(self):
        """The ssh processes of this site that hold connections open."""
        name = os.fsencode(self.dir)
        return [p for p in processes(False)
            if name in p.cmdline and (b"[mux]" in p.cmdline or b"\0-M\0" in p.cmdline) and b"sshd" not in p.cmdline]

    def strike(self, sig=SIGKILL):
        for master in until(self.masters):
            kill(master.pid, sig)

    def close(self):
        for line in self.lines:
            line.close()
        for daemon in self.daemons:
            for process in descendants(daemon.pid):
                kill(process.pid)
            daemon.kill()
            daemon.wait()
        end_everything_of(self.dir)
        for log in sorted(self.dir.glob("log-*")):
            print(f"--- {log.name} ---\n{log.read_text(errors='replace')[-4000:]}")
        subprocess.run(["chmod", "-R", "u+rwx", str(self.dir)], stderr=DEVNULL, check=False)
        shutil.rmtree(self.dir, ignore_errors=True)


class Terminal:

    def __init__(self, argv, cwd, env):
        self.output, self._screen = b"", b""
        self._end, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.child = subprocess.Popen(argv, cwd=cwd, env=env, stdin=far, stdout=far, stderr=far, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(far)

    def _read(self, seconds):
        if not select.select([self._end], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._end, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        self.output += data
        return bool(data)

    def send(self, keys):
        os.write(self._end, keys)

    def lines(self):
        """All lines that a terminal without end would show now, with the escape sequences we use obeyed and any other left to be seen."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[K|\x1b\[J|\r|\n|[^\r\n\x1b]+|\x1b", self.output.decode(errors="replace")):
            if part == "\r":
                column = 0
            elif part == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif part in ("\x1b[K", "\x1b[J"):
                lines[row] = lines[row][:column]
                lines[row + 1:] = lines[row + 1:] if part == "\x1b[K" else []
            else:
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part):]
                column += len(part)
        return lines

    def expect(self, pattern, seconds=PATIENCE):
        end = monotonic() + seconds
        while not re.search(pattern, self.output):
            assert monotonic() < end and self._read(0.1), f"never saw {pattern!r} in {self.output!r}"

    def wait(self, seconds=60):
        end = monotonic() + seconds
        while self._read(0.1) and monotonic() < end:
            if self.child.poll() is not None and not select.select([self._end], [], [], 0.1)[0]:
                break
        try:
            return self.child.wait(max(0.1, end - monotonic()))
        finally:
            self.child.kill()
            self.child.wait()
            os.close(self._end)
            assert b"Traceback" not in self.output, self.output.decode(errors="replace")

    def talk(self, *words, code=0):
        """What is awaited and what is typed, in turns, until it ends with this code."""
        for at, text in enumerate(words):
            self.send(text) if at % 2 else self.expect(text)
        assert self.wait() == code
        return self


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def replaced(site, **programs):
    """A PATH on which these programs are scripts, which go on as the programs themselves unless they exit."""
    folder = Path(tempfile.mkdtemp(dir=site.dir))
    for name, text in programs.items():
        script(folder / name, f'{text}\nexec {program(name)} "$@"')
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


RUN = '; exec "$@"'


def mounted(text, options=""):
    """A line of sh that runs "$@" where only it sees what this line mounts."""
    options = options if os.geteuid() == 0 else "-r"
    return f"exec {program('unshare', 'util-linux')} {options} -m sh -c {shlex.quote(text + RUN)} sh \"$@\""


# === Rig: repositories ===

ODD_FILES = {
    b"plain.txt": b"plain\n", b"with space.txt": b"space\n", b"quote'\"`$(x).txt": b"quotes\n", b"new\nline": b"newline\n",
    b"back\\slash": b"backslash\n", "naïve-日本-🐙.txt".encode(): "Grüße\n".encode(), b"-leading-dash": b"dash\n", b"empty": b"",
    b"binary.bin": BINARY, b"crlf.txt": b"one\r\ntwo\r\n", b"native.txt": b"one\ntwo\n", b"sub/dir/deep.txt": b"deep\n",
    b"commit.txt": b"$Format:%H %ae$ $Id$\n", b"run.sh": b"#!/bin/sh\necho ran\n", b"docs/private.md": b"not for export\n",
    b"docs/bytes": b"a\r\nb\n$Id$ $Format:%H$\n", b".gitattributes": b"docs/ export-ignore\ndocs/bytes text eol=lf ident export-subst\ncommit.txt export-subst ident\nnative.txt text eol=crlf\n", b"*star?[x]": b"glob\n",
    b"x" * 200 + b"/" + b"y" * 100: b"long\n",
}


class Repo:
    """A real repository of one or more commits, and what a host should see of it."""

    def __init__(self, site, name="project", odd=False, files=None):
        self.site, self.dir = site, site.dir / name
        self.dir.mkdir(parents=True)
        self.git("init -q -b main")
        content = {k.decode(): v for k, v in ODD_FILES.items()} if odd else {"README": b"hello\n", "src/main.c": b"int main;\n"}
        for path, data in {**content, **(files or {})}.items():
            self.write(path, data)
        if odd:
            (self.dir / "run.sh").chmod(0o755)
            (self.dir / "link").symlink_to("plain.txt")
            (self.dir / "dangling").symlink_to("nowhere/at all")
        self.commit("first")

    def git(self, line, *words, env=None, stdin=None):
        done = subprocess.run(["git", *line.split(), *words], cwd=self.dir, env=self.site.environment(env), input=stdin, capture_output=True)
        assert done.returncode == 0
        return done.stdout.decode().strip()

    def write(self, path, data, mode=None):
        target = self.dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        if mode is not None:
            target.chmod(mode)

    def commit(self, message="more"):
        self.git("add -A")
        self.git("commit -q --allow-empty -m", message)
        return self.id("HEAD")

    def save(self, files, data=b"", mode=None):
        """A commit of these files, or of that one."""
        for path, content in (files if isinstance(files, dict) else {files: data}).items():
            self.write(path, content, mode)
        return self.commit()

    def tree(self):
        """What the commit holds, path by path: the repository's own bytes."""
        def git(*words, stdin=b""):
            return subprocess.run(["git", *words], cwd=self.dir, env=self.site.env, input=stdin, stdout=PIPE, check=True).stdout
        rows = [row.split(b"\t", 1) for row in git("ls-tree", "-rz", "HEAD").split(b"\0")[:-1]]
        blobs = git("cat-file", "--batch", stdin=b"".join(meta.split()[2] + b"\n" for meta, _ in rows))
        found = {}
        for meta, path in rows:
            head, blobs = blobs.split(b"\n", 1)
            size = int(head.split()[2])
            found[path] = {b"100644": "file", b"100755": "exec", b"120000": "link"}[meta[:6]], blobs[:size]
            blobs = blobs[size + 1:]
        return found

    def cli(self, *args, **options):
        return self.site.cli(*args, cwd=self.dir, **options)

    def ok(self, *args, **options):
        done = self.cli(*args, **options)
        assert done.code == 0
        return done

    def new(self, *names, host="box", **options):
        """Workspaces on a host; without names, main."""
        return self.ok(f"new -H {host}", *(names or ["main"]), **options)

    def terminal(self, line, *words, env=None):
        return Terminal([*compiled(), *line.split(), *words], self.dir, self.site.environment({"TERM": "xterm", **(env or {})}))

    def secret(self, name, value=b"", command="", **options):
        self.ok(f"secrets set {name}", *(["--command", command] if command else []), stdin=value if isinstance(value, bytes) else value.encode(), **options)

    def exec(self, *command, host="box", options="", **rest):
        return self.cli(f"exec -H {host}", *(options.split() if isinstance(options, str) else options), "--", *command, **rest)

    def start(self, *args, **options):
        return self.site.start(*args, cwd=self.dir, **options)

    def workspaces(self):
        return {row["name"]: row for row in self.cli("list --json").json}

    def path(self, name="main"):
        """Where the workspace is; the host is this machine, so a test can look. By the record of this project, or by
        `list`, which asks the host."""
        rows = self.recorded()
        return Path((rows if name in rows else self.workspaces())[name]["path"].replace("~", str(self.site.far_home()), 1))

    def far(self, path, name="main"):
        return (self.path(name) / path).read_bytes()

    def history(self, *words):
        return self.ok("history --json", *words).rows

    def arrived(self, name="main"):
        assert tree_of(self.path(name)) == self.tree()

    def pulled(self, path, name="main"):
        return self.git("show", f"cmux/{name}:{path}")

    def id(self, name):
        return self.git(f"rev-parse {name}")

    def lose(self, name):
        name = self.id(name)
        (self.dir / ".git/objects" / name[:2] / name[2:]).unlink()

    def changed(self, what="--name-only"):
        return self.git("diff", what, "main", "cmux/main")

    def job(self, *command, host="box", options=""):
        return self.exec(*command, host=host, options=options + " --detach").text.strip()

    def record(self):
        """The file in which this project's workspaces are recorded."""
        return self.site.state / f"projects/{digest(os.fsencode(self.dir / '.git'))[:20]}.json"

    @contextmanager
    def amended(self):
        record = json.loads(self.record().read_bytes())
        yield record
        self.record().write_text(json.dumps(record))

    def recorded(self):
        """The workspaces in the record of this project; none where there is no record, or it is damaged."""
        with suppress(OSError, ValueError, KeyError):
            return dict(json.loads(self.record().read_bytes())["workspaces"])
        return {}


def fresh(site, odd=False):
    return Repo(site, f"{os.urandom(4).hex()}/project", odd, {"nonce": os.urandom(16)} if not odd else {})


def tree_of(directory):
    """The files below a directory in the form of Repo.tree, without .git."""
    found = {}
    top = os.fsencode(directory)
    for folder, folders, files in os.walk(top):
        if folder == top and b".git" in folders:
            folders.remove(b".git")
        for name in files + [f for f in folders if os.path.islink(os.path.join(folder, f))]:
            full = os.path.join(folder, name)
            path = os.path.relpath(full, top)
            if os.path.islink(full):
                found[path] = ("link", os.readlink(full))
            else:
                found[path] = ("exec" if os.stat(full).st_mode & 0o100 else "file", slurp(os.fsdecode(full)))
    return found


def files_holding(directory, needle):
    """The files below a directory that hold some bytes, git's compressed objects and tar archives looked into."""
    found = []
    for folder, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and os.path.isfile(path) and needle in slurp(path):
                found.append(path)
        if os.path.isdir(os.path.join(folder, "objects")) and os.path.isfile(os.path.join(folder, "HEAD")):
            everything = subprocess.run(["git", "--git-dir", folder, "cat-file", "--batch-all-objects", "--batch"], stdout=PIPE,
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, check=True).stdout
            found += [f"an object in {folder}"] if needle in everything else []
    return found


# === Rig: fixtures ===


@pytest.fixture(scope="session")
def keys():
    with tempfile.TemporaryDirectory(prefix="cmux-k", dir="/tmp") as directory:
        if os.geteuid() == 0:  # sshd's separation directory; a service manager makes it at boot
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        made = Keys(*(Path(directory) / f"{name}_key" for name in Keys._fields))
        for key in made:
            keygen("-t", "ed25519", "-N", "", "-C", "rig", "-f", key)
        yield made


@contextmanager
def open_site(keys):
    site = Site(keys)
    try:
        site.daemon("box")
        yield site
    finally:
        site.close()


@pytest.fixture
def site(keys):
    """A laptop with the host `box` (a daemon), all of it this test's own."""
    with open_site(keys) as opened:
        yield opened


@shared_fixture
def common(keys):
    """One laptop for all tests of this process that ask for no `site` of their own."""
    with open_site(keys) as opened:
        yield opened


def site_of(request):
    return request.getfixturevalue("site" if "site" in request.fixturenames else "common")


@pytest.fixture
def repo(request):
    """A small project, different in every test, on the test's own `site` where it asks for one."""
    return fresh(site_of(request))


@pytest.fixture
def odd(request):
    return fresh(site_of(request), odd=True)


@shared_fixture
def shared(common):
    """A project whose workspace exists already, for tests that only run commands in it."""
    repo = Repo(common)
    repo.new()
    return repo


@pytest.fixture
def line(site):
    """That of the host `far`, which is `box` behind it."""
    return site.line("far")


@pytest.fixture(params=["box", "nogit"])
def place(request):
    """A host with git, and one without."""
    return bare_host(site_of(request)) if request.param == "nogit" else request.param


@pytest.fixture
def nap():
    """A command of this test's own, which runs nowhere any more in the end."""
    own = Nap()
    yield own
    own.gone()


@pytest.fixture
def own(repo):
    """A `batch` that makes workspaces on `box`."""
    with Agent(repo, "-H box") as opened:
        yield opened


@pytest.fixture
def client(repo):
    """One of `mcp` that makes workspaces on `box`."""
    with Mcp(repo, "-H box") as opened:
        yield opened


@pytest.fixture(autouse=True)
def hang_guard(request):
    assert len(request.node.nodeid) < 10_000, "give the parameters of this test short ids"

    def ring(*_):
        raise AssertionError("the test took more than five minutes")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# === The file: rooms and doors ===

class Source:
    """cmux_ssh.py as text, syntax tree and rooms; what stands above the first banner is the room Header."""

    def __init__(self):
        self.text = PROGRAM.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.banners = [(number + 1, *match.groups()) for number, line in enumerate(self.text.splitlines())
            for match in [re.match(r"# === (\d+)\. (.+) ===$", line)] if match]

    def room(self, node):
        name = "Header"
        for line, _, banner in self.banners:
            name = banner if line <= node.lineno else name
        return name

    def rank(self, node):
        return sum(line <= node.lineno for line, _, _ in self.banners)

    def find(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def doors(self):
        """What the code reaches for: names, attributes of names, modules imported below the top of the file; and the literals that
        begin a list or are an argument, which are the shapes that a command has."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                yield node, node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield node, f"{node.value.id}.{node.attr}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and self.room(node) != "Header":
                yield from ((node, name) for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]))
            firsts = node.elts[:1] if isinstance(node, (ast.List, ast.Tuple)) else node.args if isinstance(node, ast.Call) else []
            yield from ((first, repr(first.value)) for first in firsts if isinstance(first, ast.Constant))

    def outside(self, room, doors):
        return [f"line {node.lineno} ({self.room(node)}): {self.text.splitlines()[node.lineno - 1].strip()}"
            for node, name in self.doors() if re.fullmatch(doors, name) and self.room(node) != room]


@shared_fixture
def source():
    return Source()


def defined_names(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_a_room_names_only_rooms_above_it(source):
    home = {}
    for node in source.tree.body:
        for name in defined_names(node):
            home.setdefault(name, source.rank(node))
    wrong = []
    for top in source.tree.body:
        local = {a.arg for a in ast.walk(top) if isinstance(a, ast.arg)} | {
            n.id for n in ast.walk(top) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        wrong += [f"line {n.lineno}: {n.id}" for n in ast.walk(top)
            if isinstance(n, ast.Name) and n.id not in local and home.get(n.id, 0) > source.rank(top)]
    assert not wrong


@promise(4)
def test_only_the_room_processes_spawns_and_kills(source):
    assert not source.outside("Processes", r"subprocess|signal|multiprocessing|os\.(fork\w*|posix_spawn\w*|kill|killpg|system|popen|exec[lv]\w*|spawn\w*|_exit)")


@each("room, doors", [("SSH", "socket|'ssh'"), ("Git", "'git'"), ("Command line", r"print|input|SystemExit|exit|quit|sys\.(stdout|stderr|exit|__stdout__|__stderr__)")])
def test_ssh_git_and_the_terminal_have_a_room_each(source, room, doors):
    assert not [line for line in source.outside(room, doors) if "inside WSL" not in line]


# Lowered with each step of the simplification, never raised. The goal: 330,000 bytes each. (ruff holds the lines to 100 columns.)
LIMITS = {"bytes of cmux_ssh.py": 474_660, "bytes of test_cmux_ssh.py": 457_050}


@each("measure", LIMITS)
def test_size_is_at_its_limit_and_the_limit_at_the_size(measure):
    found = {"bytes of cmux_ssh.py": PROGRAM.stat().st_size, "bytes of test_cmux_ssh.py": Path(__file__).stat().st_size}[measure]
    assert found <= LIMITS[measure], f"{measure}: {found}; make it smaller"
    assert found >= LIMITS[measure] * 0.99, f"{measure}: {found}; lower the limit to it"


def test_functions_stay_short(source):
    functions = source.find(ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [n.name for n in functions if n.end_lineno - n.lineno >= 60]


@promise(10)
@compat
def test_only_the_standard_library_is_imported(source):
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import cmux_ssh"],
        capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    roots = {a.name.split(".")[0] for n in source.find(ast.Import) for a in n.names}
    roots |= {n.module.split(".")[0] for n in source.find(ast.ImportFrom) if n.module}
    known = getattr(sys, "stdlib_module_names", None)
    assert known is None or not roots - set(known)


@promise(10)
@compat
def test_import_starts_nothing_and_writes_nothing(site):
    code = """
import decimal, gc, locale, os, signal, sys, threading, warnings
os.umask(0o77)  # what this process has may come from an import of its parent
def world():
    umask = os.umask(0o22)
    os.umask(umask)
    return (threading.active_count(), dict(os.environ), os.getcwd(), umask, list(sys.path), sys.excepthook, threading.excepthook, sys.stdout, sys.stderr,
            locale.setlocale(locale.LC_ALL), list(warnings.filters), [signal.getsignal(n) for n in range(1, 32)], sorted(os.listdir("/dev/fd")),
            sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), getattr(gc, "callbacks", None), sys.getprofile(), sys.gettrace())
before = world()
import cmux_ssh
print(world() == before, all(hasattr(cmux_ssh, n) for n in cmux_ssh.__all__), len(set(cmux_ssh.__all__)) == len(cmux_ssh.__all__))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=site.home, capture_output=True,
        env=site.environment({"PYTHONPATH": str(HERE), "CMUX_SSH_COMMAND": "false"}))
    assert (done.stdout, done.stderr) == (b"True True True\n", b"")
    assert not site.state.exists() and not list(site.tmp.iterdir())


def test_the_head_names_version_licence_and_rooms(source):
    assert re.search(r"cmux_ssh(.|\n)*\d+\.\d+(.|\n)*MIT", "\n".join(source.text.splitlines()[:8]))
    rows = re.findall(r"(?:^ {4}| {2})([ \d]\d) (\w+(?: \w+)?) {2,}\S", source.text.split('"""')[1], re.M)
    told = sorted((int(number), name) for number, name in rows)
    assert [number for number, _ in told] == [int(number) for _, number, _ in source.banners] == list(range(1, len(told) + 1))
    assert all(banner.startswith(name) for (_, name), (_, _, banner) in zip(told, source.banners))


@compat
def test_no_module_beside_the_program_is_imported(tmp_path):
    """A pulled file there, or in the directory of `-m`, would run with the developer's keys."""
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "shlex.py").write_text("raise SystemExit('foreign')")
    for words, where in (([f"{tmp_path}/cmux_ssh.py"], "/"), (["-m", "cmux_ssh"], tmp_path)):
        assert subprocess.run([sys.executable, *words, "--version"], cwd=where, capture_output=True).stdout.startswith(b"cmux_ssh.py ")


def test_native_windows_is_told_of_wsl():
    code = f"import runpy, sys; sys.modules['fcntl'] = None; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 1 and b"WSL" in done.stderr and done.stderr.count(b"\n") == 1


@promise(10)
@compat
def test_version_names_itself_and_its_digest():
    done = subprocess.run([sys.executable, "-W", "error", "-I", "-S", str(PROGRAM), "--version"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == f"cmux_ssh.py {c.__version__} (sha256 {digest(PROGRAM.read_bytes())})\n".encode()


@each("command", ["", "secrets", *c.VERBS])
@compat
def test_help_shows_an_example_and_fits(common, command):
    shown = common.cli(f"{command} -h", env={"COLUMNS": "80", "FORCE_COLOR": "1"})
    assert shown.code == 0 and re.search(rf"cmux_ssh(\.py)? {command}", shown.text.split("usage:")[1].partition("\n")[2])
    assert max(map(len, shown.text.split("\n"))) <= 80 and "\x1b" not in shown.text
    assert command not in c.VERBS or all(arg.text for arg in c.line_args(c.VERBS[command]))


# === exec: bytes, exit codes, stdin (promise 5) ===


@promise(5)
@compat
def test_every_exit_code_from_0_to_255_is_exact(shared):
    for code in (0, 1, 2, 3, 42, 77, *range(96, 100), *range(123, 132), 137, 141, 143, 254, 255):
        ran = shared.exec("sh", "-c", f"exit {code}") if code % 2 else shared.exec(f"exit {code}")
        assert ran.ended == (code, b"", b"")
    answers = shared.cli("batch", stdin=calls(f"exit {n}" for n in range(256))).rows
    assert {a["id"]: a["result"]["exit_code"] for a in answers} == {n: n for n in range(256)}


@each("name, number", [("HUP", 1), ("INT", 2), ("QUIT", 3), ("KILL", 9), ("PIPE", 13), ("TERM", 15)])
@promise(5)
@compat
def test_a_death_by_signal_is_128_plus_the_signal(shared, name, number):
    if name != "QUIT":  # bash ignores it, and a shell line runs under bash
        assert shared.exec(f"kill -{name} $$").code == 128 + number
    assert shared.exec("sh", "-c", f"kill -{name} $$").code == 128 + number


@promise(5)
def test_json_tells_a_commands_own_255_from_a_dead_line(shared):
    own = shared.exec("echo 'Host key verification failed.' >&2; exit 255", options="--json")  # as ssh says it
    assert own.code == 255 and own.json["exit_code"] == 255 and own.json["error"] is None and own.json["stderr"] == "Host key verification failed.\n"
    shared.site.host("nobody-there", "ProxyCommand false")
    dead = shared.exec("exit 255", host="nobody-there", options="--json -w elsewhere")
    assert dead.code == 255 and dead.json["error"]["message"] and dead.json["error"]["type"] and dead.json["stopped"] is None


@compat
def test_json_has_the_promised_keys_and_is_ascii(shared):
    ran = shared.exec("echo out; echo err >&2; exit 3", options="--json")
    assert ran.code == 3 and ran.err == b"" and ran.out.count(b"\n") == 1
    assert ran.json.items() >= {"workspace": "main", "host": "box", "exit_code": 3, "stdout": "out\n", "stderr": "err\n", "timed_out": False, "truncated": False}.items()
    assert 0 <= ran.json["duration"] < 20
    result = shared.exec("cat", options="--json", stdin=BINARY).json
    assert base64.b64decode(result["stdout_base64"]) == BINARY and "stdout" not in result
    text = "\x1b]52;c;x\x07 \u009b \u202e ü\r"
    esc = shared.exec("cat", options="--json", stdin=text.encode())
    assert esc.json["stdout"] == text and not set(esc.out) - set(b"\n" + bytes(range(32, 127)))
    assert shared.exec("pwd", options="--json --cwd nosuch").json["host"] == "box"


def test_stdin_arrives_or_is_left_alone(shared):
    for data in (b"\0", b"\xff\xfe\x80", b"no newline", b"\n", b"\r\n\r", b"\n~.\n~C\n", b"\x04\x03\x1a", BINARY, b"", os.urandom(1 << 20)):
        assert shared.exec("cat; cat >&2 </dev/null", stdin=data).ended == (0, data, b"")
    assert shared.exec("echo done", stdin=bytes(1 << 22)).ended == (0, b"done\n", b"")
    assert shared.exec("cat; echo end", options="-n", stdin=b"secret stdin").ended == (0, b"end\n", b"")


@promise(5)
def test_a_megabyte_on_both_streams_arrives_whole(shared):
    ran = shared.exec("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' a & "
        "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' b >&2; wait")
    assert ran.code == 0 and ran.out == b"a" * (1 << 20) and ran.err == b"b" * (1 << 20)


@promise(5)
@compat
def test_a_background_child_does_not_hold_the_call(shared):
    ran = shared.exec("sleep 30 & echo ok")
    assert ran.ended == (0, b"ok\n", b"") and ran.seconds < 10


def test_the_environment_is_as_promised(shared):
    ran = shared.exec('printf "%s|%s|%s\\n" "$A" "$B" "${PWD##*/}"; env', options=["--env", "A=x y=z", "--env", "B=it's $HOME\n\"q\"", "--cwd", "src"],
        env={"MY_LOCAL_TOKEN": "leak", "AWS_SECRET_ACCESS_KEY": "leak", "LC_X": "leak"})
    assert ran.text.startswith("x y=z|it's $HOME\n\"q\"|src\n")
    seen = dict(line.split("=", 1) for line in ran.text.splitlines() if "=" in line)
    assert seen.items() >= {"CMUX_WORKSPACE": "main", "CMUX_PROJECT": "project", "CMUX_RUNTIME": "ssh", "GIT_TERMINAL_PROMPT": "0", **dict.fromkeys(("GIT_EDITOR", "EDITOR", "VISUAL"), "true")}.items()
    assert "leak" not in ran.text and not {"CMUX_SSH_HOME", "CMUX_SSH_COMMAND", "SSH_ASKPASS", "GIT_CONFIG_GLOBAL"} & set(seen)
    (shared.site.far_home() / ".profile").write_text("export FROM_PROFILE=yes; echo noise\n")
    assert shared.exec('echo "<$FROM_PROFILE>"').out == b"<>\n"
    assert shared.exec('echo "<$FROM_PROFILE>"', options="--login").out.endswith(b"<yes>\n")


def test_one_argument_is_a_line_and_several_an_argv(shared):
    assert shared.exec('a=(x y); [[ ${a[1]} == y ]] && echo "$BASH_VERSION"').out.strip(), "the host has bash"
    assert shared.exec("echo", "$HOME; *").out == b"$HOME; *\n"
    assert shared.cli("exec -w main /bin/echo -n -- x").out == b"-- x", "the words of a command, after its first"
    for words in ("-e", "-c", "+x", "--version", "no-such-command-here", "no-such-command-here x"):  # a line is no option of its shell
        assert shared.exec(*words.split(), stdin=b"echo read from stdin\n").ended[:2] == (127, b""), words


def test_defaults_of_workspace_and_host(repo, site):
    repo.git("checkout -q -b feature/über-x")
    assert repo.exec("pwd").code == 0
    (name,) = repo.workspaces()
    assert name.startswith("feature") and "/" not in name
    assert repo.cli("exec --", "echo again").out == b"again\n"
    repo.git("checkout -q --detach")
    assert repo.exec("cat README").ended == (0, b"hello\n", b"")
    repo.git("checkout -q main")
    assert repo.cli("exec --", "echo env", env={"CMUX_SSH_HOST": site.at("second")}).out == b"env\n"
    repo.git("config cmux.host", site.at("third"))
    assert repo.cli("exec -w third --", "echo config").out == b"config\n"
    assert {row["host"] for row in repo.workspaces().values()} == {"box", "second", "third"}


# === exec: a stop is a stop (promise 6) ===


def unique():
    return f"{random.randrange(40000, 10**8)}"


@contextmanager
def stranger(*words):
    child = subprocess.Popen(words, start_new_session=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


class Nap(str):
    """A `sleep` of a test's own: a command that no other process on this machine is."""

    def __new__(cls):
        return str.__new__(cls, f"sleep {unique()}")

    def runs(self, count=1):
        until(lambda: len(running(self)) >= count)

    def gone(self):
        until(lambda: not running(self), seconds=15)


@promise(6)
@compat
def test_a_timeout_keeps_early_output_and_leaves_no_process(shared, nap):
    for trap, limit in (("", "0.02m"), ("trap '' TERM INT HUP; ", "1")):
        ran = shared.exec(f"{trap}echo early; {nap} & {nap}", options=f"--timeout {limit}")
        assert (ran.code, ran.out) == (124, b"early\n") and 1 < ran.seconds < 15
        nap.gone()
    assert shared.exec("echo a long time", options="--timeout 99999999").out == b"a long time\n"
    told = shared.exec(f"echo early; {nap}", options="--timeout 1 --json")
    assert told.code == 124 and told.json["timed_out"] is True and told.json["stdout"] == "early\n"


@each("stdin", ["null", "open"])
@each("sig, code", [(SIGINT, 130), (SIGTERM, 130), (SIGKILL, -9)])
@promise(6)
def test_a_stopped_client_ends_the_remote_command(shared, sig, code, stdin, nap):
    child = shared.start("exec --", f"echo early; {nap} & {nap}", stdin=PIPE if stdin == "open" else DEVNULL)
    assert child.stdout.readline() == b"early\n"
    nap.runs(2)
    os.killpg(child.pid, sig) if sig == SIGINT else os.kill(child.pid, sig)
    assert child.end().code == code


@promise(6)
@compat
def test_ctrl_c_on_a_terminal_is_130(shared, nap):
    terminal = shared.terminal("exec -H box --", f"echo early; {nap}")
    terminal.expect(b"early")
    nap.runs()
    terminal.send(b"\x03")
    assert terminal.wait() == 130


def test_an_interrupt_while_it_connects_is_130(repo, line):
    line.stall()
    child = repo.start("exec -H far -- true")
    until(lambda: line.connections)
    child.send_signal(SIGINT)
    assert child.wait(PATIENCE) == 130


COLOURFUL = (r"printf '\303'; sleep .2; printf '\244 \033[3'; sleep .2; printf '1mred\033[0m \33[1;32m10%%\r20%%'; sleep .2; printf '\033[m\n"
    r"\033]0;t\007\033[2J\b\303\033[8888888888888888888888888888888888888888888m\302\2331m\r\n\033[7mleft'")


@each("face", ["exec", "logs", "logs -f", "new", "several"])
def test_only_colours_pass_to_a_terminal(repo, face):
    words = face.split()
    if face == "new":
        repo.save(".cmux/init", b"#!/bin/sh\n" + COLOURFUL.encode(), 0o755)
        words = ["new", "-H", "box"]
    elif face == "several":
        repo.new("a", "b")
        words = ["exec", "--all", "-j", "1", "--", COLOURFUL]
    elif face == "exec":
        words = ["exec", "-H", "box", "--", COLOURFUL]
    else:
        words.append(repo.job(COLOURFUL))
        repo.ok("wait", words[-1])
    terminal = repo.terminal(*words).talk()
    label, on = "a | " * (face == "several"), "\x1b[1;32m"
    seen = re.sub(r"\x1b\[m\x1b\[1;32m", "", terminal.output.decode())  # off between two pieces, and on again
    assert f"{label}ä \x1b[31mred\x1b[0m {on}10%\r{label}20%" in seen
    assert "^[]0;t^G^[[2J^H\ufffd^[[%sm\\x9b1m\r\n" % ("8" * 43) in seen.replace("\r\r", "\r")
    assert f"{label}\x1b[7mleft\x1b[m" in seen


def is_lost(repo, host, strike, nap):
    """A running command, once its line is struck: it ends over there too, and the next one works."""
    repo.new(host=host)
    child = repo.start("exec --json --", f"echo early; {nap}")
    nap.runs()
    strike()
    ran = child.end()
    assert ran.code == 255 and ran.json["error"]["message"] and ran.json["stdout"] == "early\n"
    nap.gone()
    assert repo.exec("echo again", host=host).out == b"again\n"


def test_a_dead_master_is_a_lost_line(repo, site, nap):
    is_lost(repo, "box", site.strike, nap)


def test_a_line_cut_in_mid_command_is_a_lost_line(repo, line, nap):
    is_lost(repo, "far", line.drop, nap)


def ssh_without_masters(site):
    """A server by its own word of those that end a connection whose sessions come and go at once: each has its own."""
    in_sshs_place(site, 'case " $* " in *" -M "*) ;; *) exec $ssh "$@";; esac\n$ssh "$@"; r=$?\nfor a; do [ "$p" != -E ] || '
                  'echo "debug1: kex_exchange_identification: remote software version dropbear_2024.85" >>"$a"; p=$a; done\nexit $r')


def gated(site, name):
    """A daemon whose login, while the first of two files is there, waits for it to go and makes the second: the session
    is there and no shell has read anything yet."""
    gate, waits = site.dir / "gate", site.dir / "waits"
    site.daemon(name, site.first(f"[ ! -e {gate} ] || : >{waits}\nwhile [ -e {gate} ]; do sleep 0.05; done"))
    return gate, waits


def sent_whole(line, more):
    goal, seen = line.up + more, [0, 0.0]

    def quiet():
        if line.up != seen[0]:
            seen[:] = [line.up, monotonic()]
        return line.up >= goal and monotonic() > seen[1] + 1
    until(quiet)


@each("how", ["exec", "job", "one connection each"])
def test_a_command_sent_runs_no_second_time(site, how):
    gate, waits = gated(site, "slow")
    line, repo, log = site.line("far", to="slow"), Repo(site), site.dir / "ran"
    if how == "one connection each":
        ssh_without_masters(site)
    repo.new(host="far")
    assert repo.exec("true", host="far").code == 0
    gate.touch()
    child = repo.start("exec --json", *(["--detach"] if how == "job" else ["-n"]), "-w", "main", "--", f"echo run >>{log}; : {'x' * 50000}")
    sent_whole(line, 50000)
    assert waits.exists()
    line.trap = ("down", 0, lambda: (until(log.exists), line.drop()))  # which holds back the answer
    gate.unlink()
    ran = child.end()
    assert ran.code == 255
    if how != "job":
        told = ran.json["error"]
        assert told["type"] == "ConnectionLost" and "before the command was seen to begin" in told["message"] and "may still run" in told["hint"]
    assert repo.exec("true", host="far").code == 0  # by now a second one would have begun
    assert slurp(log) == b"run\n"


def test_a_slow_shell_may_still_run_what_was_sent(site, tuned, repo):
    gate, waits = gated(site, "slow")
    repo.new(host="slow")
    tuned(START_PATIENCE=1)
    gate.touch()
    ran = repo.cli("exec --json -n -w main -- true")
    told = ran.json["error"]
    assert (ran.code, told["type"]) == (255, "HostSilent") and "no shell answered" in told["message"] and "may still run" in told["hint"]
    before = site.log("slow").count("Starting session")
    refused(repo.cli("read -w main README"), 255, "no shell answered")
    assert site.log("slow").count("Starting session") == before + 1, "a minute each is not waited three times"


@each("sh", ["dash", "bash", "mksh", "ksh", "busybox"])
@each("setsid", [True, False])
def test_a_session_opened_ahead_does_the_same(site, sh, setsid):
    host, tools, naps = bare_host(site), site.dir / "posix-bin", [Nap(), Nap()]
    site.script("posix-bin/sh", f'exec {program(sh)}{" sh" if sh == "busybox" else ""} "$@"')
    (tools / "setsid").symlink_to(program("setsid", "util-linux")) if setsid else None
    assert in_library(Repo(site), r"""
log, group, *naps = sys.argv[1:]
workspace, odd = here("nogit"), "new/a\nfile\n"
def warm():
    wait_ready(log)
    return workspace
ran = warm().exec(["sh", "-c", 'echo "$A $EDITOR"; echo oops >&2; env %s >/dev/null 2>&1 & exit 7' % naps[0]], env={"A": "a\nb"})  # (ksh has a sleep of its own)
print(ran.exit_code, ran.stdout, ran.stderr, warm().exec(["cat"], stdin=b"streamed").stdout, warm().exec(["no-such-program"]).exit_code,
      warm().exec("cat; exit 5", stdin=b"in").exit_code, warm().write(odd, "in")["created"], warm().write(odd, "in")["created"], warm().read(odd).content,
      warm().exec(["env", *group.split()]).exit_code)
print(warm().exec(["sh", "-c", "env %s & env %s" % (naps[1], naps[1])], timeout=1).stopped)
warm()                                  # given up without a header
if group != "true":                     # ksh dies of what its subshell died of; without setsid SIGINT is ignored
    print(workspace.wait(workspace.start(["sh", "-c", "kill -INT $$"]))["exit_code"])
""", str(site.dir / "log-nogit"), "kill 0" if setsid else "true", *naps) == "7 b'a\\nb true\\n' b'oops\\n' b'streamed' 127 5 True False b'in' %d\nconfirmed\n" % (143 if setsid else 0) + "130\n" * setsid, host
    left = running(naps[0])
    assert len(left) == 1 and not running(naps[1]), "what a command leaves behind lives on, as with ssh"
    kill(left[0].pid)
    until(lambda: not [p for p in processes() if os.fsencode(tools) in p.environ and b"ssh" not in p.cmdline])


def without_proc(text, *values, place="/nowhere"):
    """What a script of the program's prints where /proc is elsewhere."""
    header = c.shell_header("N" * 32, "run", c.script_records(text, *values))
    return subprocess.run(["sh", "-c", c.BOOT[len("exec sh -c '"):-1].replace("/proc", place)], input=header.replace(b"/proc", place.encode()),
        stdout=PIPE, stderr=DEVNULL, timeout=60).stdout


def test_without_wrapper_and_proc_no_end_is_confirmed():
    """(From inside: where a wrapper died before it could be ended cannot be had on purpose.)"""
    with stranger(*Nap().split()) as here:
        assert b"\nleft\n" in without_proc(c.END, "99999999", "run")
        assert b"\nconfirmed\n" in without_proc(c.END, str(here.pid), "run")
        assert b"\nconfirmed\n" in without_proc(c.END, "99999999", "run", place="/proc")


@slow
def test_output_that_is_full_and_does_not_block_ends_no_command(repo):
    """The wrapper's own marks cannot be written either."""
    full = """import os, time
os.set_blocking(1, False)
try:
    while True:
        os.write(1, b"x" * 4096)
except BlockingIOError:
    time.sleep(4)
"""
    repo.new()
    child = repo.start("exec --", f"python3 -c '{full}'; exit 7", stdin=PIPE)
    sleep(8)  # nobody reads
    ran = child.end()
    assert ran.code == 7 and not ran.err and set(ran.out) == set(b"x")


def test_a_stopped_master_does_not_hang_a_new_call(repo, site):
    repo.new()
    child = repo.start("exec -n --", "touch up; until [ -e go ]; do sleep 0.05; done; echo on; exit 4")
    until((repo.path() / "up").exists)
    (master,) = site.masters()
    kill(master.pid, SIGSTOP)
    first = repo.exec("echo alive", seconds=100)
    kill(next(added.pid for added in site.masters() if added.pid != master.pid), SIGTERM)
    again = repo.exec("echo alive", seconds=100)
    assert first.ended == again.ended == (0, b"alive\n", b"")
    assert again.seconds < first.seconds - 2.5, "the next process need not find out again"
    kill(master.pid, SIGCONT)
    assert repo.exec("touch go").code == 0 and len(site.masters()) == 2
    assert child.end().ended == (4, b"on\n", b""), "it goes on when its master wakes"


@each("stdin", [None, pytest.param(b"in", marks=slow)])
def test_a_hung_master_is_stopped_over_another(repo, stdin, site, nap):
    repo.new()
    child = repo.start("exec --timeout 3 --json --", f"cat; echo on; {nap}", stdin=DEVNULL if stdin is None else PIPE)
    if stdin:
        child.stdin.write(stdin)
        child.stdin.close()
        child.stdin = None
    nap.runs()
    site.strike(SIGSTOP)
    ran = child.end()
    assert (ran.code, ran.json["timed_out"], ran.json["stopped"]) == (124, True, "confirmed")
    assert ran.json["duration"] < 18, "the silent session is not waited for as long as one that answers"


def test_a_timeout_comes_while_output_never_pauses(shared):
    child, began = shared.start("exec --timeout 1 -- yes"), monotonic()
    while os.read(child.stdout.fileno(), 4096):
        assert monotonic() - began < 15
        sleep(0.01)
    assert child.wait(15) == 124


@each("how", ["timeout", "SIGINT", "SIGTERM"])
@each("where", ["pipe", "terminal", "several"])
@promise(6)
def test_a_reader_that_stops_holds_up_no_stop(repo, nap, where, how):
    several = where == "several"
    repo.new("main", *["b"] * several)
    reader, writer = pty.openpty() if where == "terminal" else os.pipe()
    child = Child([*compiled(), "exec", *["--all"] * several, *["--timeout=3"] * (how == "timeout"), "--", f"{nap} & yes"],
        cwd=repo.dir, env=repo.site.env, stdin=DEVNULL, stdout=writer, stderr=PIPE)
    os.close(writer)
    try:
        nap.runs()
        sleep(1)  # until the output is full
        if how != "timeout":
            child.send_signal(getattr(signal, how))
        ran = child.end()
        assert ran.code == (124 if how == "timeout" else 130) and ("0 of 2 succeeded" if several else "its processes have ended") in ran.said
        nap.gone()
    finally:
        child.kill()
        os.close(reader)


@slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a /proc of its own")
@each("shell", ["dash", "bash", "mksh", "ksh", "busybox sh", "zsh"])
def test_a_hidden_process_is_not_confirmed_blindly(site, shell, repo):
    """hidepid=2, and a command, or a child of its group, that is not dumpable: no table shows it to its own user."""
    napping = unique()
    site.script("names/sh", """exec bash -c 'exec -a sh zsh "$@"' sh "$@\"""" if shell == "zsh" else f'exec {shell} "$@"')
    login = site.script("login", "exec unshare -m sh -c 'mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid 65534 --regid 65534 "
        f"--clear-groups env PATH={site.dir}/names:$PATH sh -c \"$SSH_ORIGINAL_COMMAND\"'")
    host = site.daemon("hides", f"ForceCommand {login}")
    for path in (site.dir, site.remote):
        path.chmod(0o755)
    os.chown(site.far_home(host), 65534, 65534)
    hide = f"import ctypes, time; ctypes.CDLL(None).prctl(4, 0); open('up', 'a'); time.sleep({napping})"
    repo.new(host=host)
    for line in (["python3", "-c", hide], [f'python3 -c "{hide}" & wait'], ["--detach"]):
        if line == ["--detach"]:
            job = repo.cli("exec -w main --detach -- python3 -c", hide).text.strip()
            until((repo.path() / "up").exists)
            ran = repo.cli(f"stop -w main {job} --json")
        else:
            ran = repo.cli("exec -w main -n --timeout 2 --json --", *line)
            assert ran.code == 124
        assert (repo.path() / "up").exists() and ran.json["stopped"] == "requested"
        until(lambda: not naming(f"sleep({napping})"))
        (repo.path() / "up").unlink()


@each("ps", [True, False])
def test_a_newline_in_a_process_misleads_no_stop(site, ps, repo, nap):
    site.inetd("bare", shell="busybox") if ps else small_host(site, "setsid", "bash")
    odd = site.dir / "a\nb c d"
    shutil.copy(program("sleep"), odd)
    with stranger(str(odd), "300") as one_, stranger("sleep", "300") as other:
        assert repo.exec(f"{nap} & {nap}", host="bare", options="--timeout 1").code == 124
        nap.gone()
        assert one_.poll() is other.poll() is None


# === Nothing else leaves (promise 1) ===


@pytest.fixture
def agent(site):
    """An ssh-agent that holds a key, and the variable that leads to it."""
    sock = str(site.dir / "agent")
    with stranger(program("ssh-agent", "openssh-client"), "-D", "-a", sock):
        until(lambda: os.path.exists(sock))
        env = {"SSH_AUTH_SOCK": sock}
        ssh_add(site, env, "-q", site.keys.stranger)
        yield env


def ssh_add(site, env, *words):
    return subprocess.run([program("ssh-add", "openssh-client"), *map(str, words)], env=site.environment(env), check=words != ("-L",), stdout=PIPE, stderr=DEVNULL).stdout


def locked_key(site):
    key = site.dir / "locked"
    shutil.copy(site.keys.user, key)
    keygen("-p", "-P", "", "-N", "right", "-f", key)
    return key


class Hostile:
    """A host entry with everything on that lets something leave, and a server that takes it all."""

    def __init__(self, site, *more):
        self.site, self.ports, self.marker, self.xauth = site, [free_port() for _ in range(3)], site.dir / "local-command-ran", site.dir / "xauth-ran"
        xauth = site.dir / "xauth"
        script(xauth, f"touch {self.xauth}")
        local, remote, socks = self.ports
        site.daemon("hostile", f"HostKey {site.keys.other_host}", "AcceptEnv *", "X11Forwarding yes", "GatewayPorts yes", "AllowTcpForwarding yes", "PermitTunnel yes",
            f"XAuthLocation {xauth}", config=[
                "ForwardAgent yes", "ForwardX11 yes", "ForwardX11Trusted yes", f"XAuthLocation {xauth}", "SendEnv *",
                "SetEnv FROM_CONFIG=leak", f"LocalForward {local} 127.0.0.1:{site.port}", f"RemoteForward {remote} 127.0.0.1:{site.port}",
                f"DynamicForward {socks}", "PermitLocalCommand yes", f"LocalCommand touch {self.marker}", "AddKeysToAgent yes",
                "UpdateHostKeys yes", "LogLevel QUIET", f"ControlPath {site.dir}/user-cm", "ControlMaster auto", "ControlPersist 30", *more])

    def listening(self):
        return [port for port in self.ports if answers(port)]


LEAKS = {"FOO_SECRET": "leak", "LC_LEAK": "leak", "DISPLAY": "localhost:99"}


LOOK = 'env; echo "agent=<$SSH_AUTH_SOCK> display=<$DISPLAY>"; tty; echo up >up; while [ ! -e go ]; do sleep 0.05; done; rm -f go up'


@promise(1)
def test_a_config_that_lets_everything_leave_lets_nothing_leave(site, repo, agent):
    hostile = Hostile(site, "RequestTTY force", "RemoteCommand echo hijacked")
    before, known = ssh_add(site, agent, "-L"), site.known_hosts.read_bytes()
    # The control: plain ssh with this very config does leak, or the test would prove nothing.
    plain = site.ssh("hostile", "", "-o", "RemoteCommand=env", "-o", "ControlMaster=no", "-T", env={**agent, **LEAKS})
    assert b"SSH_AUTH_SOCK=" in plain.stdout and b"FOO_SECRET=leak" in plain.stdout and b"FROM_CONFIG=leak" in plain.stdout
    assert hostile.marker.exists() and ssh_add(site, agent, "-L") != before and site.known_hosts.read_bytes() != known
    site.known_hosts.write_bytes(known)
    hostile.marker.unlink()
    hostile.xauth.unlink(missing_ok=True)
    ssh_add(site, agent, "-q", "-d", site.keys.user)
    repo.new(env={**agent, **LEAKS}, host="hostile")
    child = repo.start("exec -H hostile --", LOOK, env={**agent, **LEAKS})
    up = repo.path() / "up"
    until(up.exists)
    listening = hostile.listening()
    (repo.path() / "go").touch()
    ran = child.end()
    assert (ran.code, ran.err, listening) == (0, b"", []) and b"leak" not in ran.out and b"hijacked" not in ran.out
    assert b"agent=<> display=<>" in ran.out and b"not a tty" in ran.out
    config = next(row["text"] for row in repo.ok("doctor hostile --json").json if row["what"] == "config")
    for word in ("ForwardAgent", "ForwardX11", "SendEnv", "SetEnv", "LocalForward", "RemoteForward", "DynamicForward", "LocalCommand", "RemoteCommand"):
        assert word in config, "doctor says what it would let out"
    assert not hostile.marker.exists() and not hostile.xauth.exists() and not (site.dir / "user-cm").exists()
    assert ssh_add(site, agent, "-L") == before and site.known_hosts.read_bytes() == known


@each("directive", ["RemoteCommand echo hijacked", "SessionType none", "StdinNull yes", "ForkAfterAuthentication yes", "RequestTTY force",
    "LogLevel QUIET", "ControlMaster auto", "IgnoreUnknown UseKeychain\n  UseKeychain yes", "Compression yes",
    "EscapeChar ~", "ServerAliveInterval 1", "BatchMode no", "ConnectTimeout 0"])
@promise(1)
def test_one_hostile_directive_alone_changes_nothing(site, directive):
    site.host("one", "IgnoreUnknown SessionType,StdinNull,ForkAfterAuthentication" if "Unknown" not in directive else "# ", directive,
        "HostName 127.0.0.1", f"Port {site.port}", f"ControlPath {site.dir}/user-cm")
    assert Repo(site).exec("cat; echo err >&2; exit 5", host="one", stdin=b"\n~.\n~C\n" + BINARY).ended == (5, b"\n~.\n~C\n" + BINARY, b"err\n")


@promise(1)
def test_the_users_own_master_is_neither_used_nor_touched(repo, site):
    sock = str(site.dir / "user-cm")
    site.at("mine", None, f"ControlPath {sock}", "ControlMaster auto", "ControlPersist 60")
    theirs = site.ssh("mine", "echo $SSH_CONNECTION", "-n").stdout
    assert os.path.exists(sock) and site.ssh("mine", "echo $SSH_CONNECTION").stdout == theirs
    ours = repo.exec("echo $SSH_CONNECTION", host="mine")
    assert ours.code == 0 and ours.out != theirs
    assert site.ssh("mine", "echo $SSH_CONNECTION").stdout == theirs


def in_sshs_place(site, text):
    """From now on a script is the program's ssh; $ssh is the real one."""
    site.env["CMUX_SSH_COMMAND"] = site.script("in-sshs-place", f"ssh='{program('ssh')} -F {site.config}'\n{text}")


@each("when", ["later", "for a command"])
def test_what_a_config_adds_later_does_not_leave(site, when):
    """Match exec may change its mind. Before OpenSSH 10, which has Match sessiontype and Match command, a program in ssh's
    place plays them."""
    new = int(re.findall(rb"OpenSSH_(\d+)", subprocess.run([program("ssh"), "-V"], stderr=PIPE).stderr)[0]) >= 10
    repo, flag, seen = Repo(site, files={"big": os.urandom(400_000)}), site.dir / "flag", site.dir / "seen"
    site.daemon("far", "AcceptEnv *", site.first(f"env >>{seen}"))
    match = 'command "exec*" sessiontype exec' if new and when != "later" else f'exec "test -e {flag} -o x$CARRIES = xyes"'
    site.entries.insert(0, f'Match originalhost far {match}\n  SendEnv LEAK*\n  StrictHostKeyChecking no\n')
    site._write_config()
    site.env["LEAK_ME"] = "leak"
    if when != "later" and not new:
        in_sshs_place(site, 'n=0; for a; do [ "$n$a" != 0-- ] && [ $n = 0 ] || n=$((n+1)); done\n'
            '[ $n -lt 3 ] || export CARRIES=yes; exec $ssh "$@"')
    assert in_library(repo, """
project = Project(".")
main = project.ensure("main", "far")
print(main.exec("echo work >README").exit_code)
open(sys.argv[1], "w").close()
print(pull(main).branch, project.create("other", "far").name)
""", str(flag if when == "later" else "/dev/null")) == "0\ncmux/main other\n"
    repo.ok("doctor far")
    repo.ok("diff -w main")
    repo.terminal("shell -w main").talk(b"[#$] ", b"exit 7\r", code=7)
    assert b"CMUX_SSH=1" in seen.read_bytes() and b"leak" not in seen.read_bytes()
    site.known_hosts.write_text(f"rig {public(site.keys.other_host)}\n")
    repo.save("big", os.urandom(400_000))
    refused(repo.cli("push -w other"), 255, "has changed")
    assert site.ssh("far", "exec true", env={"CARRIES": "yes"}).returncode == 0 and b"leak" in seen.read_bytes(), "plain ssh does all that"


@promise(1)
def test_proxies_and_a_coder_entry_reach_the_host(site, repo):
    site.daemon("inner", config=["ProxyJump box"])
    site.inetd("piped", config=["SendEnv *"])
    coder = site.dir / "coder prog"
    script(coder, f"[ \"$*\" = 'ssh --stdio --ssh-host-prefix coder. coder.dev' ] || exit 3\n"
        f"exec {program('sshd')} -i -f {site.sshd_config('coder')} -E {site.dir}/log-coder")
    site.host("coder.*", "ConnectTimeout=0", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel ERROR",
        f'ProxyCommand "{coder}" ssh --stdio --ssh-host-prefix coder. %h')
    for name, host in (("a", "inner"), ("b", "piped"), ("c", "coder.dev")):
        assert repo.exec("cat; exit 6", host=host, options=f"-w {name}", stdin=BINARY).ended == (6, BINARY, b""), (host, site.log("coder"))
    assert "Accepted publickey" in site.log("inner") and "Accepted publickey" in site.log("box")


def test_proxycommand_keeps_its_environment(repo, site):
    inner = site.sshd_config("needy", "AcceptEnv *")
    proxy = site.dir / "proxy"
    script(proxy, f'[ "$PROXY_PROFILE" = work ] || exit 3\nexec {program("sshd")} -i -f {inner} -E {site.dir}/log-needy')
    site.host("needy", f"ProxyCommand {proxy}", "SendEnv LC_* FOO_?")
    ran = repo.exec("env", host="needy", env={"PROXY_PROFILE": "work", "LC_ALL": "C.UTF-8", "FOO_1": "leak"})
    assert ran.code == 0 and b"leak" not in ran.out and b"LC_ALL" not in ran.out and b"PROXY_PROFILE" not in ran.out


@promise(1)
def test_a_changed_host_key_is_always_refused(site, repo):
    site.inetd("mitm", host_key=site.keys.other_host, config=["StrictHostKeyChecking no", "LogLevel QUIET"])
    before = site.known_hosts.read_bytes()
    repo.secret("TOKEN", b"s3cr3t-for-mitm")
    ran = repo.exec("cat", host="mitm", stdin=b"hello")
    assert ran.code == 255 and ran.out == b"" and "key" in ran.said.lower() and "changed" in ran.said.lower()
    assert "Accepted publickey" not in site.log("mitm") and site.known_hosts.read_bytes() == before


@each("text", [b"REMOTE HOST IDENTIFICATION HAS CHANGED", b"x\nHost key verification failed.", b"Could not resolve hostname"])
def test_a_servers_last_words_are_not_sshs_own(repo, text, site):
    body = b"\x01" + struct.pack(">II", 2, len(text)) + text + struct.pack(">I", 0)
    pad = 8 - (len(body) + 5) % 8 + 8

    def serve(door):
        while True:
            try:
                with door.accept()[0] as peer:
                    peer.sendall(b"SSH-2.0-x\r\n")
                    peer.recv(9999)
                    peer.sendall(struct.pack(">IB", len(body) + 1 + pad, pad) + body + b"\0" * pad)
                    peer.recv(9999)
            except OSError:
                return
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen(9)
        Thread(target=serve, args=(door,), daemon=True).start()
        ran = repo.exec("true", host=site.at("rude", door.getsockname()[1]))
    assert ran.code == 255 and "ended the connection" in ran.said and "keygen" not in ran.said and "does not resolve" not in ran.said


def test_a_server_that_wants_a_password_gets_no_prompt(site):
    asked = site.dir / "asked"
    askpass = site.dir / "askpass"
    script(askpass, f"touch {asked}\necho password")
    site.inetd("password", "PasswordAuthentication yes", "KbdInteractiveAuthentication yes", "PubkeyAuthentication no", config=["BatchMode no"])
    ran = Repo(site).exec("true", host="password", env={"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":99"})
    assert ran.code == 255 and ran.said.strip() and not asked.exists()


@promise(4)
def test_a_promisor_repository_fetches_nothing(repo):
    trap = repo.dir.parent / "trap"
    for key, value in (("core.repositoryformatversion", "1"), ("extensions.partialClone", "origin"), ("remote.origin.promisor", "true"),
            ("remote.origin.url", f"ext::sh -c touch% {trap}"), ("protocol.ext.allow", "always"),
            ("core.sshCommand", f"touch {trap}"), ("remote.origin.uploadpack", f"touch {trap};")):
        repo.git("config", key, value)
    repo.lose("HEAD:README")
    assert repo.cli("new -H box a").code == 1 and not trap.exists() and repo.workspaces() == {}


def test_a_git_directory_of_somebody_else_is_refused(repo, common):
    """It came with a clone, and its config names a host and a work tree."""
    inner = repo.dir / "vendor"
    repo.git("clone -q --bare .", str(inner))
    (inner / "config").write_text(f"[core]\n repositoryformatversion = 0\n bare = false\n worktree = {common.home}\n[cmux]\n host = box\n")
    for words in ("new w", "new --dirty w", "exec -n -- true", "list"):
        refused(common.cli(words, cwd=inner), 125 if "exec" in words else 1, "inside another repository")
    apart = repo.dir.parent / "apart.git"
    inner.rename(apart)
    (apart / "config").write_text("[core]\n repositoryformatversion = 0\n bare = true\n")
    assert common.cli("list", cwd=apart).code == 0  # a bare repository by itself is one
    if os.geteuid() == 0:  # only root can make a repository of somebody else's
        subprocess.run(["chown", "-R", "65534:65534", str(repo.dir)], check=True)
        refused(repo.cli("new -H box a"), 1, "another user")


def test_unreadable_or_huge_attributes(site):
    repo = Repo(site, files={".gitattributes": b"#" * (1 << 20) + b"\n* text\n", "a/.gitattributes": b"hidden export-ignore\n", "a/hidden": b"1"})
    repo.new("w")
    repo.arrived("w")
    repo.save(".gitattributes", b"x text\n")
    repo.lose("HEAD:.gitattributes")
    refused(repo.cli("new -H box x"), 1, "partial clone")


@promise(1)
def test_only_the_tree_leaves(repo, site):
    secrets = {"token": b"tok-in-git-config-1", "dotenv": b"untracked-dotenv-2", "stash": b"only-in-the-stash-3", "branch": b"other-branch-blob-4",
        "old": b"only-in-history-5", "message": b"commit-message-6"}
    repo.git("config http.extraheader", secrets["token"].decode())
    repo.git("remote add origin https://user:hunter2-8@example.invalid/x.git")
    repo.write("old.txt", secrets["old"])
    repo.commit(secrets["message"].decode())
    repo.git("checkout -q -b other")
    repo.save("other.txt", secrets["branch"])
    repo.git("checkout -q main")
    repo.git("rm -q old.txt")
    repo.write("README", secrets["stash"])
    repo.git("stash -q")
    repo.git("rm -q old.txt")
    head = repo.commit()
    repo.write(".env", secrets["dotenv"])
    assert repo.exec("git log --all --format='%an %ae %H %s'").code == 0
    far = site.far_home()
    assert files_holding(far, b"hello\n"), "looking finds what is there"
    for needle in [*secrets.values(), b"hunter2-8", b"ada@laptop.example", b"Ada Test", head.encode(), os.fsencode(repo.dir)]:
        assert not files_holding(far, needle), needle


def test_every_ssh_has_a_double_dash(repo, site):
    log = site.dir / "argv"
    in_sshs_place(site, f'for a; do printf "%s\\n" "$a"; done >>{log}\necho ---- >>{log}\nexec $ssh "$@"')
    assert repo.exec("true").code == 0
    runs = [run.split("\n")[:-1] for run in log.read_text().split("----\n") if run]
    assert runs
    for run in runs:
        assert run == ["-V"] or "box" not in run or run[run.index("box") - 1] == "--"
        assert not any("IgnoreUnknown" in word or re.search(r"StrictHostKeyChecking=(no|off)|UserKnownHostsFile", word) for word in run)
        assert {"-G", "-V", "-O"} & set(run) or {"-a", "-x"} <= set(run)


# === secrets (promise 2) ===


HARD = ["a b", "", "it's", "$HOME", "!x", "x\ny", "-n", "--", "\\", "\\\\n", "`id`", "$(id)", '"', "*", "~", "tab\there", "ü🐙", "a;b|c&d>e", "end\n", "%s", "{a,b}",
    "#", "=x", "^a", "[!]", "\x01\x7f", "!!", "\\!"]


@each("shell", SHELLS)
def test_arguments_output_codes_stdin_and_secrets_are_exact_under_every_login_shell(site, shell):
    repo, host = Repo(site, odd=True), site.login(shell)
    repo.secret("TOKEN", "it's\n$(x) \"ü\" \\n !")
    assert repo.exec("printf", "<%s>", *HARD, host=host).ended == (0, "".join(f"<{word}>" for word in HARD).encode(), b"")
    assert repo.exec('printf "<%s>" "it\'s" \'$HOME\' !x; echo " $((1 + 2))" >&2; exit 7', host=host).ended == (7, b"<it's><$HOME><!x>", b" 3\n")
    assert repo.exec('cat; printf %s "$TOKEN"', host=host, stdin=BINARY).ended == (0, BINARY + "it's\n$(x) \"ü\" \\n !".encode(), b"")
    repo.arrived()
    assert in_library(repo, """
workspace = here()
def warm():  # a session that was opened ahead
    wait_ready(sys.argv[1])
    return workspace
workspace.exec("true")
print(warm().exec(["printf", "<%s>", "it's", "!x"]).stdout, warm().write("a\\n'b", "one\\n")["created"], warm().read("a\\n'b").content,
      warm().edit("a\\n'b", [{"old": "one", "new": "two"}])["diff"].count("two"), warm().exec(["cat"], stdin=b"in").stdout)
""", str(site.dir / f"log-{host}")) == "b\"<it's><!x>\" True b'one\\n' 1 b'in'\n"
    plain, noise = site.ssh(host, f"readlink /proc/{'$fish_pid' if shell == 'fish' else '$$'}/exe; true"), f"noise-of-{shell}".encode()
    assert noise in plain.stdout and noise in plain.stderr, "the control: it is noisy, and that shell"
    assert plain.stdout.split()[-1] == os.fsencode(os.path.realpath(program(shell)))


@each("foreign", ["bash -l", "zsh", "dash", "fish", "tcsh", "mksh", "ksh", "busybox sh", "cat", ".bashrc"])
def test_a_foreign_shell_runs_nothing_and_reads_no_secret(site, foreign, repo, nap, tuned):
    """A ForceCommand, or what .bashrc runs, reads what we send in place of our command."""
    silent = foreign in ("cat", "fish")  # until its stdin ends
    flag, touched, got = site.dir / "flag", site.dir / "touched", site.dir / "got"
    if foreign == ".bashrc":
        host = site.login("bash")
        (site.far_home(host) / ".bashrc").write_text(f"[ ! -e {flag} ] || exec zsh\n")
    else:
        host = site.daemon("foreign", site.first(f"[ ! -e {flag} ] || exec {foreign}" + f" >>{got}" * (foreign == "cat")))
    repo.new(host=host)
    for number, value in enumerate((f"touch {touched}", nap)):
        repo.secret(f"S{number}", value)
    flag.touch()
    tuned(START_PATIENCE=10)
    for words in (["-n"], ["--env", f"V=touch {touched}"], ["--detach"])[:1 if silent else 3]:
        ran = repo.exec("true", host=host, options=words, stdin=None if "-n" in words or "--detach" in words else b"touch %s" % os.fsencode(touched))
        refused(ran, 255, "no shell answered" if silent else "did not run our command")
    assert not touched.exists() and not running(nap)
    assert not re.search(b"S0|sleep|true", slurp(got)) and (foreign != "cat" or slurp(got).startswith(b"exit 0\n"))
    flag.unlink()
    assert repo.exec('printf %s "$S1"', host=host).out == nap.encode()


@promise(2)
@compat
def test_a_secret_arrives_and_lies_nowhere_on_the_host(repo, site):
    """Also under names that are used otherwise; but not _, which every shell sets anew."""
    odd = [b"", b"x", b" lead and trail ", b"\\", b"-n", b"-e \\c", b"%s%n", b"*", b"a" * c.SECRET_MAX, "é\u2028".encode(),
        "it's \"q\"\n$(touch x) `id` \\n\\\\ \t\r\n  spaces  \n#!*ü🐙\u202e-Zx9Yw8".encode()]
    values = dict(zip(["GIT_AUTHOR_NAME", "k", "n", "v", "CMUX", "OPENAI_API_KEY", "lower", "V1", "V2", "V3", "TOKEN"], odd))
    for name, value in values.items():
        repo.secret(name, value)
    (site.dir / "dotenv").write_text('V99="trailing\\n\\n"\n')
    repo.ok("secrets import", str(site.dir / "dotenv"))
    values["V99"] = b"trailing\n\n"
    ran = repo.exec("; ".join(f'printf "%s." "${name}"' for name in values))
    assert (ran.code, ran.out) == (0, b"".join(value + b"." for value in values.values()))
    assert repo.exec("sh", "-c", "sleep 0.1; printf %s \"$TOKEN\"").out == odd[-1]
    assert not files_holding(site.far_home(), b"Zx9Yw8") and "Zx9Yw8" not in site.log()


@slow
@promise(2)
@compat
def test_while_50_commands_run_the_secret_stands_in_no_process_table(repo, site):
    value = b"Sentinel-" + os.urandom(8).hex().encode()
    repo.new()
    with watched(value) as looks:
        repo.secret("TOKEN", value)
        runs = at_once(10, lambda n: repo.exec('sleep 0.1; printf %s "$TOKEN" | cksum', host="box"), range(50))
    assert len({r.out for r in runs}) == 1 and all(r.code == 0 for r in runs)
    assert len(looks) > 20 and not any(looks)
    assert not [p for p in site.masters() if value in p.environ]
    assert not files_holding(site.far_home(), value) and value.decode() not in site.log()


@promise(2)
def test_a_secret_is_in_the_environment_of_no_local_process(repo, nap):
    """Not even where a variable of that name stood in ours: ProxyCommand and Match exec would see it."""
    value = b"Sentinel-" + os.urandom(8).hex().encode()
    repo.secret("TOKEN", value)
    child = repo.start("exec -H box --", nap)
    nap.runs()
    seen = [p for p in processes() if value in p.environ]
    assert seen and all(b"CMUX_TEST_SITE" in p.environ for p in seen)
    kill(child.pid)
    child.communicate()


def secret_names(repo, words=""):
    return [row["name"] for row in repo.ok(f"secrets list --json {words}").json]


@promise(2)
def test_secrets_are_stored_0600_and_listed_by_name_only(repo, site):
    repo.secret("B_TOKEN", b"value-of-b")
    repo.secret("A_TOKEN", b"value-of-a")
    assert secret_names(repo) == ["A_TOKEN", "B_TOKEN"] and "value-" not in repo.ok("secrets list").text
    assert repo.cli("secrets set C --json", stdin=b"c").json == ["C"] == repo.cli("secrets rm C --json").json
    holders = [Path(p) for p in files_holding(site.dir, b"value-of-a")]
    assert all(site.state in p.parents and mode_of(p) == 0o600 for p in holders) and holders
    assert mode_of(site.state) == 0o700 and repo.git("status --porcelain") == ""
    repo.ok("secrets rm A_TOKEN")
    assert secret_names(repo) == ["B_TOKEN"] and not files_holding(site.dir, b"value-of-a")


def test_secrets_have_scopes_and_the_narrower_wins(repo, site):
    repo.new("a", "b")
    site.cli("secrets set T --global", cwd=site.dir, stdin=b"global-1")  # outside a repository, too
    for words, data in (("set G --global", b"global-2"), ("set T", b"project-1"), ("import - -w a", b"T=own-of-a\nG=own-2-of-a\n")):
        repo.ok(f"secrets {words}", stdin=data)

    def seen(name, project=repo):
        return project.cli(f"exec -w {name} -H box --", "echo $T $G").text.split()
    assert (seen("a"), seen("b"), seen("c", Repo(site, "other"))) == (["own-of-a", "own-2-of-a"], ["project-1", "global-2"], ["global-1", "global-2"])
    assert [row.split()[:3] for row in repo.cli("secrets list").text.splitlines()] == [
        ["NAME", "SCOPE", "WORKSPACE"], ["G", "global", "-"], ["G", "workspace", "a"], ["T", "global", "-"], ["T", "project", "-"], ["T", "workspace", "a"]]
    assert [(r["scope"], r.get("workspace"), r["kind"]) for r in repo.cli("secrets list --json").json if r["name"] == "T"] == [
        ("global", None, "value"), ("project", None, "value"), ("workspace", "a", "value")]
    assert secret_names(repo, "-w b") == ["G", "T", "T"]
    repo.ok("rename -w a d")
    repo.ok("fork -w d e")
    repo.new("a")
    assert seen("d") == seen("e") == ["own-of-a", "own-2-of-a"] and seen("a") == seen("b")
    holders = [Path(p) for p in files_holding(site.dir, b"own-of-a")]
    assert [(site.state in p.parents, mode_of(p)) for p in holders] == [(True, 0o600)] * 2
    Path(f"{holders[0]}.new").write_bytes(b"own-of-a")  # of a writer that was killed
    repo.ok("rm d")
    repo.ok("rm --forget e")
    assert not files_holding(site.dir, b"own-of-a") and secret_names(repo) == ["G", "T", "T"]
    for words, code in (("set X -w d", 1), ("rm G", 1), ("rm T -w a", 1), ("set X --global -w a", 2), ("list -w d", 1)):
        refused(repo.cli(f"secrets {words}", stdin=b"v"), code)
    repo.ok("secrets rm T")
    repo.ok("secrets rm G --global")
    assert seen("a") == ["global-1"]


def test_exec_hands_over_the_named_secrets(repo, site):
    repo.save(".cmux/init", b"#!/bin/sh\necho $A $B >init\n", 0o755)
    repo.ok("secrets import -", stdin=b"A=1\nB=2\n")
    repo.secret("BAD", command="exit 3")
    for options, out in (("-w w1 --no-secrets", "\n"), ("-w w2 --secret B", "2\n"), ("-w w4 --secret A --secret B", "1 2\n")):
        assert repo.exec("echo $A $B; cat init", options=options).text == out * 2
        job = repo.job("echo $A $B", options=options)
        repo.ok("wait", *options.split()[:2], job)
        assert repo.cli("logs", *options.split()[:2], job).text == out
    assert sorted(repo.exec("echo $A", options="-w w1 -w w2 --secret A").text.splitlines()) == ["w1 | 1", "w2 | 1"]
    refused(repo.exec("true"), 125, words="secret BAD")
    for options in ("-w w1 --secret NONE", "-w new --secret NONE", "--secret A --no-secrets"):
        refused(repo.exec("true", options=options), 125)
    assert set(repo.workspaces()) == {"main", "w1", "w2", "w4"}
    assert in_library(repo, """
project = Project(".")
project.set_secret("A", "own", workspace="w1")
w = project.workspace("w1")
project.set_secret("C", "all", everywhere=True)
print(w.exec("echo $A $B $C", secrets=["A", "C"]).stdout, w.exec("echo $A $B", secrets=[]).stdout)
w.wait(w.start("echo $A $B >j", secrets=["B"]))
print(w.read("j").content, project.create("v", "box", secrets=()).read("init").content)
""") == "b'own all\\n' b'\\n'\nb'2\\n' b'\\n'\n"


def test_secrets_of_every_scope_are_masked(repo, site):
    repo.new("w", "other")
    ran = site.dir / "ran"
    repo.ok("secrets set T --global --command", "echo glo''bal-value")
    repo.ok("secrets set T", stdin=b"project-value")
    repo.ok("secrets set T -w w --command", "echo ow''n-value")
    repo.ok("secrets set T -w other --command", f"touch {ran}; echo x")
    do(repo, "for f in global project own; do echo $f-value >$f; done", "w")
    with Mcp(repo, "-w w") as client:
        assert all(client("read", path=name).count("[secret T]") == 1 for name in ("global", "project", "own"))
    assert repo.ok("pull w --json").json["secrets"] == {name: ["T"] for name in ("global", "project", "own")} and not ran.exists()


def test_a_secret_command_is_stored(repo, common):
    store = repo.dir.parent / "vault"
    store.write_text("from-the-vault")
    repo.secret("TOKEN", command=f"cat {store}")
    assert repo.exec('printf %s "$TOKEN"').out == b"from-the-vault" and not files_holding(common.state, b"from-the-vault")
    store.unlink()
    refused(repo.exec("echo ran"), 125, "TOKEN")
    repo.ok("secrets rm TOKEN")
    repo.secret("LOUD", command="head -c 200000 /dev/zero >&2; echo v")
    refused(repo.exec("true"), 125, "The command for the secret LOUD")
    repo.secret("LOUD", command="echo abcdefg; exit 7")
    refused(repo.exec("echo ran", sh='''exec bash -c 'trap "" CHLD; exec "$@"' sh "$@"'''), 125, "failed with status 7")


def test_no_secret_lies_in_a_record(repo, common):
    values = {"PLAIN": "hunter2-hunter2-XYZ", "QUOTE": "it's-a-s\u00e9cret-Q9", "LINES": "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\n-----END KEY-----"}
    for name, value in values.items():
        repo.secret(name, value)
    repo.secret("MADE", command="echo from-com''mand-C7-long")
    said = [values["PLAIN"], values["QUOTE"], "from-command-C7-long", values["LINES"].split("\n")[1]]
    assert repo.exec("echo", *said).code == 0
    assert repo.exec(f"echo {said[0]}", options="--detach").code == 0 and repo.exec("echo", *said, options="--detach").code == 0
    told = repo.cli("history").text + repo.cli("jobs").text
    assert in_library(repo, "print(Project('.').workspace('main').exec([b'printf', sys.argv[1].encode()]).exit_code)", said[1]) == "0\n"
    assert "cret-Q9" not in repo.cli("history").text and all(told.count(f"[secret {name}]") >= 2 for name in ("PLAIN", "QUOTE", "MADE", "LINES"))
    kept = b"".join(slurp(p) for p in common.state.rglob("*") if p.is_file() and not any("secrets" in part for part in p.parts))
    for value in [*said, said[1].replace("'", "'\"'\"'")]:
        assert value.encode() not in kept and json.dumps(value).encode() not in kept, value


@promise(1)
def test_the_state_is_never_sent(repo, site):
    """A home that is a repository holds the secrets of every project. (`git add` fails where an excluded path is ignored already.)"""
    home = Repo(site, name="home/dotfiles")
    env = {"CMUX_SSH_HOME": str(home.dir / ".local" / "state" / "cmux-ssh")}
    repo.secret("OTHER", b"other-project-secret-1234", env=env)
    home.write("new", b"new\n")
    home.new("--dirty", "main", env=env)
    there = tree_of(site.far_home() / "cmux")
    assert any(path.endswith(b"/main/new") for path in there) and not any(b"other-project" in data or b"cmux-ssh" in path for path, (_, data) in there.items())
    assert b"cmux-ssh" not in home.git("ls-tree -r --name-only", home.git("for-each-ref --format=%(objectname) refs/cmux/sent")).encode()
    home.write(".gitignore", b".local\n")
    home.new("--dirty", "ignored", env=env)
    clean = home.id("HEAD")
    (home.dir / ".gitignore").unlink()
    home.git("add .local")
    home.git("commit -q -m everything")
    for words in ("new -H box x", "new -H box --dirty x", "push -w main --force"):
        refused(home.cli(words, env=env), 2, "in the commit")
    home.new("--ref", clean, "x", env=env)


@each("name", ["", "1A", "A-B", "A B", "A=B", "a\nb", "Ü", "PATH", "IFS", "-x", "CMUX_WORKSPACE", "_cmux_run"])
def test_impossible_secret_names_are_refused(shared, name):
    refused(shared.cli("secrets set --", name, stdin=b"v"), 2)
    assert shared.cli("secrets list").out == b""


@each("typed, words", [(b"typed-in-secret\r", b""), (b"\x04", b"1 to 4094"), (b"\r", b"1 to 4094"), (b"a\x16\x00b\r", b"NUL"),
    (b"x" * 5000 + b"\r", b"1 to 4094"), (b"\xff\xfe\r", b"is text")], ids=["secret", "end", "enter", "nul", "long", "bytes"])
def test_secrets_set_asks_without_echo(repo, typed, words):
    repo.secret("TOKEN", b"good")
    terminal = repo.terminal("secrets set TOKEN")
    terminal.expect(b"hidden")
    until(lambda: not termios.tcgetattr(terminal._end)[3] & termios.ECHO)
    terminal.send(typed)
    terminal.expect(words)
    assert terminal.wait() == (2 if words else 0) and b"typed-in-secret" not in terminal.output
    assert repo.exec('printf %s "$TOKEN"').out == (b"good" if words else b"typed-in-secret")


def test_a_dotenv_file_is_read_or_refused_without_a_word_of_its_values(repo):
    file, large = repo.dir.parent / "dot", repo.dir.parent / "large"
    file.write_text("A=1\nhttps://bob:hunter2@db.example/x?y=1\n")
    large.write_bytes(b"A=1\n" + b"#hunter2\n" * (1 << 17))
    for line, words in (("set TOK=hunter2", "secrets set TOK"), (f"import {file}", "Line 2"), (f"import {large}", "larger than"), ("set TOK", "NUL")):
        said = repo.cli(f"secrets {line}", stdin=b"abc\0hunter2")
        refused(said, 2, words)
        assert "hunter2" not in said.said
    assert repo.cli("secrets list").out == b""
    file.write_bytes("A=x # c\nB= # c\nC=#x\nD='a # b' # c\nE=\"x\\ny\"\t#c\nF='x' y\r\nG=a#b  \r\nexport H = it's\n\n# no\n"
        "PLAIN=abc\nexport EXPORTED=def\nQUOTED=\"a b\\n$X\"\nSINGLE='it is $HOME \\n'\nUNI=ü\nI=".encode())
    repo.ok("secrets import", str(file))
    assert repo.exec('printf "%s|" "$A" "$B" "$C" "$D" "$E" "$F" "$G" "$H" "$PLAIN" "$EXPORTED" "$QUOTED" "$SINGLE" "$UNI" "${I-none}"').text == (
        "x||#x|a # b|x\ny|'x' y|a#b|it's|abc|def|a b\n$X|it is $HOME \\n|ü||")
    file.write_text("A=x" + " " * 110_000 + "y\n")
    repo.ok("secrets import", str(file), seconds=10)
    assert repo.exec('echo "${#A}"').out == b"110002\n"


def test_a_secret_command_that_goes_on_is_ended(repo, nap):
    flag = repo.dir.parent / "flag"
    repo.secret("T", command=f"printf hunter2; [ ! -e {flag} ] || exec >&- 2>&-; exec {nap}")
    assert in_library(repo, """
workspace, run = Project(".").ensure("main", "box"), cmux_ssh.run
for call in (lambda cancel: workspace.exec("echo ran", cancel=cancel).exit_code, lambda cancel: workspace.start("true", cancel=cancel)):
    cancel = Cancel()
    threading.Timer(0.5, cancel.set).start()
    print(repr(raised(call, cancel))[:9])
# from inside: of its own it is given two minutes
cmux_ssh.run = lambda *words, **more: run(*words, **dict(more, patience=1))
open(sys.argv[1], "w").close()
print(raised(workspace.exec, "true"))
""", str(flag)) == "130\nCancelled\nThe command for the secret T: A local command did not end in time.\n"
    nap.gone()


def test_a_closed_stdin_is_no_empty_one(repo):
    repo.new()
    for words, stdin in (("write f", "<&-"), ("secrets set X", "<&-"), ("secrets set X", "</dev/null"), ("batch", "<&-"), ("edit README", "<&-")):
        done = repo.cli(words, sh=f'exec "$@" {stdin}')
        assert done.code == 2 and "stdin" in done.said
    assert not (repo.path() / "f").exists() and repo.cli("secrets list").out == b""


def test_a_secret_changed_elsewhere_is_new_at_once(repo):
    assert in_library(repo, """
import subprocess
project = Project(".")
workspace = project.create("main", "box")
def change(*words, value=None):
    subprocess.run([sys.executable, sys.argv[1], "secrets", *words], input=value, check=True, stdout=subprocess.DEVNULL)
for value in (b"first-value", b"second-value"):
    change("set", "TOKEN", value=value)
    print(workspace.exec("printf %s $TOKEN").stdout.decode())
change("rm", "TOKEN")
print(repr(workspace.exec("printf %s $TOKEN").stdout))
""", str(PROGRAM)) == "first-value\nsecond-value\nb''\n"


@promise(1)
def test_dirty_takes_the_work_tree_along_but_no_secrets(repo):
    repo.save(".gitignore", b"ignored\n")
    repo.write("README", b"edited\n")
    repo.write("untracked", b"u")
    repo.write("ignored", b"i")
    (repo.dir / "src/main.c").unlink()
    index = (repo.dir / ".git/index").read_bytes()
    assert "3 uncommitted" in repo.new("clean").said
    repo.new("main", "--dirty")
    assert set(tree_of(repo.path())) == {b".gitignore", b"README", b"untracked", b"nonce"}
    assert (repo.dir / ".git/index").read_bytes() == index
    repo.write("config/.env", b"SECRET=1")
    repo.write("id_rsa", b"KEY")
    refused(repo.cli("push -w clean --dirty"), 2, "--allow config/.env --allow id_rsa")
    repo.ok("push -w clean --dirty --allow config/.env --allow id_rsa")
    assert (repo.path("clean") / "config/.env").exists()
    do(repo, "echo agent >>README")
    repo.ok("pull")
    assert repo.pulled("README") == "edited\nagent" and (repo.dir / ".git/index").read_bytes() == index


def test_parts_of_secrets_are_found_in_linear_time(repo, client):
    def shown(text):
        return client("exec", command=["cat"], stdin=text).partition("\n--- stdout\n")[2].rpartition("\n[end")[0]
    shown("")  # makes the workspace
    for at, words in enumerate(("..abab ababc", "aab aabaac", "aabaa aabaac", "aaaba aabaac", "abaaa caabaa", "c abc", "xabca abca", "abcab abcabd")):
        data, secret = re.sub("[a-d]", lambda found, at=3 * at: chr(ord(found[0]) + at) * 2, words).split()
        repo.secret("S", secret)
        for first in (False, True):
            sizes = [n for n in range(4, min(len(secret), len(data) + 1)) if (data[:n] == secret[-n:] if first else data[-n:] == secret[:n])]
            masked = data if not sizes else "[secret S]" + data[max(sizes):] if first else data[:-max(sizes)] + "[secret S]"
            assert shown(f"[...]{data}" if first else f"{data}[...]") == (f"[...]{masked}" if first else f"{masked}[...]").replace(secret, "[secret S]"), (data, secret)
    for n in range(2):
        repo.secret(f"LONG{n}", b"x" * 100_000 + b"y%d" % n)
    repo.secret("KEY", "-----BEGIN KEY-----\n" + "\n".join(os.urandom(24).hex() for _ in range(26)) + "\n-----END KEY-----\n")
    assert shown(("x" * 99_000 + "z[...]") * 8 + "x" * 99_000 + "end").endswith("x" * 20 + "end")
    client("exec", command="yes '[...]' | tr -d '\\n' | head -c 1000000; yes '[...]' | tr -d '\\n' | head -c 1000000 >&2")  # seen: 99 s


# === Hosts: any that ssh reaches (promise 9) ===


@slow
@each("way", ["master", "direct"])
def test_a_server_that_ends_silent_channels(site, tuned, way, repo, nap):
    site.daemon("hasty", "ChannelTimeout session:command=8s")
    if way == "direct":
        ssh_without_masters(site)
    repo.new(host="hasty")

    def streamed(line):
        child = repo.start("exec -w main --", line, stdin=PIPE)
        code = child.wait(30)  # its stdin stays open all the while
        return code, child.stdout.read() + child.stderr.read()
    assert streamed("sleep 12; echo end") == (0, b"end\n")
    refused(repo.cli("exec -n -w main --", nap), 255, "ChannelTimeout")
    tuned(BEAT_EVERY=4)
    assert repo.cli("exec -n -w main --", "sleep 12; exit 7").code == 7
    assert repo.cli("exec -n -w main --timeout 12 --", nap).code == 124
    nap.gone()


def posix_tools(folder, *more, busybox=True):
    """A path with the POSIX utilities, busybox's where it has them, and the named programs."""
    folder.mkdir()
    applets = subprocess.run([program("busybox"), "--list"], stdout=PIPE, check=True).stdout.decode().split() if busybox else ()
    for name in (*POSIX, *more):
        path = program("busybox") if name in applets else shutil.which(name) if name in POSIX else program(name)
        (folder / name).symlink_to(path) if path else None
    return str(folder)


def small_host(site, *more):
    """A host of busybox, also as its login shell; it has no git unless that is named."""
    return site.inetd("bare", shell="busybox", env={"PATH": posix_tools(site.dir / "busybox-bin", *more)})


def test_an_ended_process_is_not_killed(monkeypatch):
    """Its number may be a stranger's by now. (From inside: no number can be had a second time on purpose.)"""
    struck = []
    monkeypatch.setattr(os, "killpg", lambda pid, sig: struck.append(pid))
    ended, running_on = c.spawn(["/bin/true"]), c.spawn(["/bin/sh", "-c", "read x"], stdin=-1)
    ended.wait()
    c.kill_group(ended)
    assert struck == []
    Timer(1, running_on.kill).start()
    c.kill_group(running_on)
    assert struck == [running_on.pid]


@each("programs", ["plain", "gzip", "gzip, near", "false gzip", "gzip that stops", "gzip that hangs"])
def test_an_archive_arrives_by_any_gzip(site, tuned, programs):
    small_host(site)
    path = site.dir / "busybox-bin"
    scripts = {"false gzip": "cat >/dev/null; echo gzip", "gzip that stops": f"head -c 60000 | {program('gzip')} -dc",
        "gzip that hangs": f"[ -n \"$ONCE\" ] || {program('gzip')} -dc; [ -f {site.dir}/once ] && exec sleep 600; : >{site.dir}/once"}
    if programs != "plain":
        real = f'exec {program("gzip")} "$@"'
        script(path / "gzip", f"[ \"$1\" ] || {real}\n{scripts.get(programs, real)}")
    tuned(GZIP_FROM="inf" if "near" in programs else 0, STALL_PATIENCE=4, CALL_PATIENCE=15)
    repo = Repo(site, files={"text": source_text(4 << 20)})
    made = repo.cli("new -v -H bare w", seconds=120)
    if "gzip that" in programs or programs == "false gzip":
        assert made.code == (255 if "hangs" in programs else 1) and made.said.strip() and repo.workspaces() == {}
        (path / "gzip").unlink()
        made = repo.cli("new -v -H bare w", seconds=120)
    assert made.code == 0 and tree_of(repo.path("w")) == repo.tree()
    assert ("compressed to" in made.said) == (programs == "gzip")


def test_a_slow_tar_is_waited_for(site, tuned):
    site.inetd("slow", env=replaced(site, tar=f'{program("tar")} "$@"; r=$?; sleep 5; exit $r'))
    tuned(STALL_PATIENCE=2)
    terminal = Repo(site).terminal("new -H slow main").talk(rb"main  unpacking \d+s")
    assert not any("unpacking" in line for line in terminal.lines())


def test_an_init_hook_that_is_noexec_is_said(repo, site):
    """What sh says of it: bash, dash and mksh have no `test -x` there, others fail to run it."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("only root mounts")
    repo.save(".cmux/init", b"#!/bin/sh\ntouch ran\n", 0o755)
    root = site.far_home() / "cmux"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", str(root)], check=True)
    try:
        made = repo.new()
        assert "failed with status 126" in made.said and "noexec" in made.said
        assert not (repo.path() / "ran").exists()
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_readonly_home_on_the_host_is_said(repo, site):
    (site.far_home() / "cmux").write_text("in the way")
    refused(repo.cli("new -H box a"), 1, "cmux")
    assert repo.workspaces() == {}


@each("shell", ["dash", "bash", "mksh"])
def test_a_cdpath_of_the_host_misleads_no_script(site, shell):
    """Where CDPATH names a directory that has what a relative `cd` asks for, cd goes there, and prints where."""
    repo, trap = Repo(site, files={"sub/x": b"x\n"}), site.dir / "trap"
    for path in ("cmux", ".cmux", "sub"):
        (trap / path).mkdir(parents=True)
    tools = site.dir / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to(program(shell))
    site.inetd("cdpath", env={"CDPATH": str(trap), "PATH": f"{tools}:{site.env['PATH']}"})
    repo.new(host="cdpath")
    ran = repo.cli("exec --cwd sub -- pwd")
    assert (ran.code, ran.text) == (0, f"{repo.path()}/sub\n")
    do(repo, "echo y >sub/y")
    repo.ok("pull")
    assert repo.pulled("sub/y") == "y"
    terminal = repo.terminal("shell").talk(b"as it likes", b"pwd; exit 3\r", code=3)
    assert str(repo.path()).encode() in terminal.output
    assert not [p for p in trap.rglob("*") if p.name not in ("cmux", ".cmux", "sub")]


def test_a_home_with_a_newline_is_refused(site, repo):
    home = site.dir / "new\nline"
    home.mkdir()
    site.daemon("odd-home", site.first(f"HOME='{home}'; export HOME"))
    refused(repo.cli("new -H odd-home main"), 1, "a newline is in the path")
    assert not repo.workspaces()


def refused(answer, code, *parts, words=""):
    """One clear message, with these parts: the right code, nothing on stdout, no traceback, not a wall of text."""
    assert answer.code == code
    assert answer.out == b"" and answer.said.strip() and answer.said.count("\n") <= 4
    assert all(part.lower() in answer.said.lower() for part in (words, *parts))
    assert not set(answer.err) & set(b"\x1b\x07\x9b\r")


BAD_HOSTS = ["-oProxyCommand=touch trap", "-F", "--", "", " ", "@", "@h", "u@", "a b", "a\nb", "a\tb", "a;b", "a|b", "a&b", "a$(id)", "$HOME", "`id`@h", "u'@h", 'u"@h',
    "h>x", "h<x", "{a,b}", "a,b", "h(x)", "-x@h", "u@-x", "u$HOME@h", "u v@h", "u\\@h", "a\\b", "u@a\\", "u{@h", "u@h;", "\x1b]0;x\x07", "\u202eh", "\u202e@h", "\x9bh",
    "h\x7f", "h\u3000", "ssh://-oProxyCommand=x", "ssh://u%24HOME@h", "ssh://u%0a@h", "ssh://-u@h", "ssh://", "ssh://h/x", "ssh://u@v@h", "ssh://h:0", "ssh://h:65536",
    "a" * 2000, "u@h\n"]


GOOD_HOSTS = ["box", "root@box", "u.s-e_r+1@a.b-c_d", "127.0.0.1", "::1", "u@fe80::1", "ssh://u@h:2222", "coder.dev-1", "prod/web", "web+1", "a~b", "k8s/pod=1", "h\u00e4us", "host.",
    "fe80::1%eth0", "DOMAIN\\ada@host", "ada%root%10.0.0.5@psmp", "target:ssh:ada@wallix", "ada#asset@jump", "role=admin,ada@host", "ssh://DOM%5cada@h.",
    "u@a@" + "b" * 250]


@each("way", ["option", "environment", "git config"])
def test_hostile_host_strings_start_nothing(repo, way, site):
    log = site.dir / "was-called"
    in_sshs_place(site, f"touch {log}\nexit 255")
    for host in BAD_HOSTS[::1 if way == "option" else 3]:
        if way != "option" and not host.strip() or way == "environment" and host in ("a b", "u v@h"):
            continue  # an empty variable is an unset one, and two words are a pool
        repo.git("config cmux.host", host) if way == "git config" else None
        refused(repo.cli("exec", *[f"--host={host}"] * (way == "option"), "--", "true", env={"CMUX_SSH_HOST": host} if way == "environment" else {}), 125)
        assert not log.exists() and not (repo.dir / "trap").exists(), host


def test_honest_host_strings_reach_ssh(repo, site):
    log = site.dir / "argv"
    in_sshs_place(site, f'for a; do printf "%s\\n" "$a"; done >>{log}\nexit 255')
    for host in GOOD_HOSTS:
        ran = repo.exec("true", host=host)
        assert ran.code == 255 and host in log.read_text().splitlines()
        assert shlex.split(ran.said.rpartition(": ")[2])[-1] == host, "and the command to paste names it"


def test_hosts_and_users_that_openssh_allows_work(repo, site):
    user = getpass.getuser()
    for n, host in enumerate(["k8s/pod=1", "h\u00e4us", "a~b", f"{user}@web+1"]):
        site.at(host.rpartition("@")[2])
        assert repo.exec("echo up", host=host, options=f"-w w{n}").out == b"up\n"
        assert repo.cli(f"exec -w w{n} --", "echo up").out == b"up\n" and repo.workspaces()[f"w{n}"]["host"] == host
    site.inetd("locked", "DenyUsers *")
    said = repo.exec("true", host="DOMAIN\\ada@locked").said
    assert site.environment()["CMUX_SSH_COMMAND"] + " 'DOMAIN\\ada@locked' true" in said


def test_too_many_keys_are_said(repo, site, agent):
    site.daemon("bare-h", "MaxAuthTries 3", config=site.trusted())
    for n in range(3):
        more = str(site.dir / f"key{n}")
        keygen("-t", "ed25519", "-N", "", "-f", more)
        ssh_add(site, agent, "-q", more)
    ssh_add(site, agent, "-q", site.keys.user)
    ran, found = repo.exec("true", host="bare-h", env=agent), repo.cli("doctor bare-h", env=agent)
    assert b"question" not in repo.terminal("exec -H bare-h -- true", env=agent).talk(code=255).output, "nobody could answer it"
    for said in (ran.said, found.text):
        assert "too many keys were tried" in said and "IdentitiesOnly yes, and IdentityFile" in said and "accepted none" not in said
    assert (ran.code, found.code) == (255, 255)


@each("call", ["exec -H box -- true", "new -H box main", "doctor box", "batch -H box"])
def test_an_ssh_before_7_8_is_refused(repo, call, site):
    in_sshs_place(site, 'for a; do case $a in -V) echo OpenSSH_7.7p1 >&2; exit;; SetEnv=*)\n'
        'echo "command-line: line 0: Bad configuration option: setenv" >&2; exit 255;; esac; done; exec $ssh "$@"')
    ran = repo.cli(call, stdin=b'{"tool": "exec", "arguments": {"command": "true"}}\n')
    said = ran.said + ran.text
    assert ran.code == {"doctor": 1, "batch": 1}.get(call.split()[0], 255) and said.count("OpenSSH 7.8 or newer") == 1 and "may still run" not in said
    assert repo.workspaces() == {} and "Accepted" not in site.log()


def test_a_server_that_turns_us_away(repo, line):
    """OpenSSH 9.8 and later say so before their banner, for MaxStartups and for a penalty."""
    words = b"Not allowed at this time\r\n"
    line.away = (2, words)
    assert repo.exec("echo in", host="far").out == b"in\n" and line.connections == 3
    line.away = (99, words)
    line.drop()
    refused(repo.exec("true", host="far", options="--timeout 4"), 255, "far turns this address away")
    assert "far turns this address away" in repo.cli("doctor far").text


@each("entry, named", [("HostKeyAlias Box.new", "box.new"), ("", "[127.0.0.1]:{port}"), ("UserKnownHostsFile {first} {second}", "[127.0.0.1]:{port}")])
def test_the_command_for_a_changed_key_works(repo, entry, named, site):
    first, second = site.dir / "known one", site.dir / "known'2"
    site.daemon("bare-h", config=[entry.format(first=f'"{first}"', second=f'"{second}"'), f'UserKnownHostsFile "{second}"', f"IdentityFile {site.keys.user}", "IdentitiesOnly yes"])
    first.write_text(f"other {public(site.keys.host)}\n")
    second.write_text(f"{named.format(port=site.ports['bare-h'])} {public(site.keys.other_host)}\n")
    told = repo.exec("true", host="bare-h")
    refused(told, 255, "has changed")
    command = told.said.split("old one: ")[1]
    assert next(row for row in repo.cli("doctor bare-h --json").json if row["what"] == "connect")["fix"].endswith(command.strip())
    assert subprocess.run(["sh", "-c", command], stdout=DEVNULL, stderr=DEVNULL, check=False).returncode == 0, command
    refused(repo.exec("true", host="bare-h"), 255, "not known")


@each("trouble, answers_, code, words", [
    ("unknown", [("yes/no", "no")], 255, "not known"), ("unknown", [("yes/no", "yes")], 0, "it ran"), ("changed", [], 255, "ssh-keygen -f"), ("strict", [], 255, "not known"),
    ("passphrase", [("passphrase", "right")], 0, "it ran"), ("passphrase", [("passphrase", "wrong"), ("passphrase.*passphrase", "")], 255, "accepted none")])
def test_on_a_terminal_ssh_asks_once(repo, trouble, answers_, code, words, site):
    if trouble == "passphrase":
        site.daemon("bare-h", config=[*site.trusted(), f"IdentityFile {locked_key(site)}", "IdentitiesOnly yes"])
    else:
        site.daemon("h", host_key=site.keys.other_host, config=[f"StrictHostKeyChecking {'yes' if trouble == 'strict' else 'ask'}", f"HostKeyAlias {'rig' if trouble == 'changed' else 'new'}"])
    turns = [text for question, answer in answers_ for text in (b"(?s)" + question.encode(), answer.encode() + b"\r")]
    terminal = repo.terminal("exec -H", "bare-h" if trouble == "passphrase" else "h", "--", "echo it ran").talk(*turns, code=code)
    assert words.encode() in terminal.output and b"debug1" not in terminal.output and b"no reason" not in terminal.output
    assert (b"may have a question" in terminal.output) == bool(answers_)


@each("lost", ["passphrase", "agent"])
def test_a_login_by_a_person_serves_all_after_it(repo, lost, site, agent):
    """A key whose passphrase was typed once, or that has left the agent since: failed logins cost penalties."""
    key, words = locked_key(site), ("exec", "-H", "bare-h", "--", "echo work >>README")
    site.daemon("bare-h", config=site.trusted() + ["IdentitiesOnly yes", f"IdentityFile {key}"] * (lost == "passphrase"))
    def asked(*words):
        repo.terminal(*words, env=agent).talk(b"passphrase", b"right\r")
    if lost == "passphrase":
        asked(*words)
    else:
        ssh_add(site, agent, "-q", site.keys.user)
        repo.ok(*words, env=agent)
        ssh_add(site, agent, "-q", "-d", site.keys.user)
    before = site.log("bare-h").count("Connection from")
    repo.save("big", os.urandom(600_000))
    for command in (("diff", "-w", "main"), ("pull", "-w", "main"), ("new", "-H", "bare-h", "big"), ("push", "-w", "main"), ("diff", "-w", "big"),
            ("rm", "main"), ("exec", "-w", "big", "--", "echo more >>README")):
        repo.ok(*command, env=agent)
    assert tree_of(repo.path("big"))[b"big"] == repo.tree()[b"big"] and "work" in repo.pulled("README")
    assert site.log("bare-h").count("Connection from") - before == (lost == "agent"), "one try, and never again"
    site.strike()
    if lost == "passphrase":
        asked("pull", "-w", "big")
    else:
        refused(repo.cli("pull -w big", env=agent), 255, "accepted none")
        assert site.log("bare-h").count("Connection from") - before == 2


@slow
@each("root", ["~/else where", "~", "relative/x"])
def test_contract_a_tilde_is_the_home_over_there(repo, root, site):
    repo.new("--root", root, "main")
    path = repo.workspaces()["main"]["path"]
    home = str(site.far_home())
    assert path.startswith((root.replace("~", home, 1) if root.startswith("~") else f"{home}/{root}") + "/") and Path(path, "README").is_file()
    assert repo.exec("cat README").out == repo.cli("read README").out == b"hello\n"


def test_a_server_that_asks_for_the_agent_is_left(repo, site):
    """What ssh writes into its log then was seen on a real one; no server here does it."""
    words, name = "Warning: ssh server tried agent forwarding.\nWarning: this is probably a break-in attempt by a malicious server.\n", site.dir / "name"
    in_sshs_place(
        site, f'case " $* " in *" -M "*) for a; do [ "$p" != -E ] || echo "$a" >{name}; p=$a; done;; esac\nexec $ssh "$@"')
    repo.new()
    log = name.read_text().strip()
    with open(log, "a") as stream:
        stream.write(words)
    told = repo.exec("echo ran")
    assert told.code == 0 and told.out == b"ran\n" and "WARNING: The server of box asked for this machine's agent" in told.said
    with open(log, "a") as stream:
        stream.write(words * 1000)
    refused(repo.exec("echo ran"), 255, "Do not trust that machine")
    until(lambda: not site.masters())
    again = repo.exec("echo ran")
    assert again.code == 0 and not again.said


@each("tar", ["bsdtar", "busybox"])
def test_every_kind_of_tar_unpacks_the_same(site, tar):
    small_host(site, "git")
    path = site.dir / "busybox-bin/tar"
    path.unlink()
    path.symlink_to(program(tar, {"bsdtar": "libarchive-tools"}.get(tar, tar)))
    repo = Repo(site, odd=True)
    assert repo.exec("git status --porcelain; git log --format=%s | wc -l", host="bare").out.strip() == b"1"
    repo.arrived()
    repo.ok("exec --", "echo agent >>plain.txt; rm empty; echo n >'new file'")
    repo.ok("pull")
    assert repo.changed("--name-status").split("\n") == ["D\tempty", "A\tnew file", "M\tplain.txt"]
    repo.save("plain.txt", b"mine\n")
    repo.ok("push")
    repo.arrived()


@each("name", ["home with space", "it's \"home\" $(x)", "-home", "h\u00f6me"])
def test_a_home_with_any_name_works(site, name):
    home = site.remote / name
    home.mkdir()
    site.inetd("strange", site.first(f"HOME={shlex.quote(str(home))}; export HOME"))
    repo = Repo(site, odd=True)
    ran = repo.exec("pwd; echo x >made", host="strange")
    assert ran.code == 0 and name in ran.text
    assert repo.cli("read made").out == b"x\n" and repo.cli("pull").code == 0 and repo.pulled("made") == "x"
    repo.ok("exec -- true")
    repo.ok("rm main")


@each("what", ["bytes", "inodes"])
def test_a_full_disk_on_the_host_leaves_nothing_half(site, what):
    home = site.far_home("small")
    site.inetd("small")
    entry = site.entries[0]
    command = re.search(r"ProxyCommand (.*)", entry).group(1)
    unshare = f"{program('unshare', 'util-linux')} {'-m' if os.geteuid() == 0 else '-rm'}"
    start = script(site.dir / "start-small", f"exec {unshare} sh -c 'mount -t tmpfs -o {'size=600k' if what == 'bytes' else 'nr_inodes=40'} none {home} && exec {command}'")
    site.entries[0] = entry.replace(command, str(start))
    site._write_config()
    repo = Repo(site, files={f"f{n}": os.urandom(40000) for n in range(60)})
    made = repo.cli("new -H small main")
    assert made.code == 1 and re.search("(?i)disk|space", made.said)
    assert repo.workspaces() == {}


def test_half_of_a_copied_repository_is_not_kept(site, repo):
    site.daemon("full", env=replaced(site, cp=f'case "$*" in *" .git") mkdir .git; {program("cp")} "$2/index" .git; exit 1;; esac'))
    for name in ("first", "second"):
        repo.new(name, host="full")
        assert repo.ok(f"exec -w {name} --", "git fsck --strict && git status --short").out == b""


@each("verb, room", [("new", "nr_inodes=2"), ("pull", "size=40k"), ("pull", "nr_inodes=2"), ("batch", "size=40k"), ("exec", "size=40k")])
def test_a_full_disk_on_this_machine_is_said(repo, verb, room):
    assert repo.exec("head -c 300000 /dev/urandom >big").code == 0
    repo.save("large", os.urandom(300000))
    small = repo.dir.parent / "small"
    small.mkdir()
    words = {"new": ["new", "-H", "box", "second"], "pull": ["pull"], "batch": ["batch"], "exec": ["exec", "--", "cat >got"]}[verb]
    line = json.dumps({"id": 1, "workspace": "main", "tool": "exec", "arguments": {"command": "cat >got", "stdin": "x" * 300000}}).encode() + b"\n"
    done = repo.cli(*words, env={"TMPDIR": str(small)}, stdin=line if verb == "batch" else b"x" * 300000, sh=mounted(f"mount -t tmpfs -o {room} none {small}"))
    assert '"Bug"' not in done.text + done.said
    if verb == "exec":
        assert done.code == 0 and (repo.path() / "got").stat().st_size == 300000, "stdin streams through: it needs no room here"
    else:
        assert done.code == 1 and re.search("room|space|disk", done.text + done.said)
    assert set(repo.workspaces()) == {"main"}


# === Many at once (promise 8) ===


def test_a_foreign_shell_in_a_session_opened_ahead(site, repo):
    host, flag, touched = site.login("bash"), site.dir / "flag", site.dir / "touched"
    (site.far_home(host) / ".bashrc").write_text(f"[ ! -e {flag} ] || {{ echo >>{flag}; exec dash; }}\n")
    repo.secret("S", b"touch %s" % os.fsencode(touched))
    assert in_library(repo, """
import os
workspace = here(sys.argv[1])
def said():
    try:
        return workspace.exec(["true"]).exit_code
    except ConnectionFailed as error:
        return "did not run our command" in str(error)
    finally:
        wait_ready(sys.argv[3])
wait_ready(sys.argv[3])
open(sys.argv[2], "w").close()
print([said() for _ in range(4)])      # those that wait are ours; those that come after them are not
while os.path.getsize(sys.argv[2]) < 4:
    time.sleep(0.02)
os.unlink(sys.argv[2])
print([said() for _ in range(5)])
""", host, str(flag), str(site.dir / f"log-{host}")) == "[0, 0, 0, 0]\n[True, True, True, True, 0]\n"
    assert not touched.exists()


@slow
@promise(8)
def test_20_processes_on_a_cold_connection_all_succeed(repo, site):
    children = [repo.start("exec -H box --", f"echo {n}; cat README") for n in range(20)]
    for n, child in enumerate(children):
        assert child.end(seconds=120).ended == (0, f"{n}\nhello\n".encode(), b""), site.log()
    assert set(repo.workspaces()) == {"main"}, "created once"
    assert "drop connection" not in site.log()


@slow
@promise(8)
def test_200_commands_50_at_a_time_all_succeed(shared):
    runs = at_once(50, lambda n: shared.exec(f"echo {n}; exit {n}"), range(200))
    assert [r.ended for r in runs] == [(n, b"%d\n" % n, b"") for n in range(200)]
    assert "drop connection" not in shared.site.log()


@slow
@each("way", ["refuses", "hangs up"])
@promise(8)
def test_a_host_that_is_down_is_not_hammered(repo, way, site):
    """And each attempt is answered within a minute, though it may wait for its turn to try."""
    log = site.dir / "attempts"
    line = site.line("down")
    line.refuse = way == "hangs up"
    if way == "refuses":
        site.at("down", free_port())
    in_sshs_place(site, f'case " $* " in *" -G "*|*" -V "*|*" -O "*) ;; *) echo try >>{log};; esac\nexec $ssh "$@"')
    runs = at_once(20, lambda n: repo.exec("true", host="down", seconds=60), range(100))
    assert {r.code for r in runs} == {255} and all(r.said.strip() for r in runs)
    assert log.read_text().count("try") <= 12 and line.connections <= 12
    line.refuse = False
    site.at("down", line.port)
    until(lambda: repo.exec("echo up", host="down").out == b"up\n", seconds=60)


@slow
def test_50_processes_keep_to_the_budget(repo, site):
    """Each master of theirs takes a mark before it connects and gives it back when it is authenticated; sshd
    numbers the sessions of a connection from 0."""
    marks = site.dir / "marks"
    in_sshs_place(site, f'case " $* " in *" -M "*) ;; *) exec $ssh "$@";; esac\necho + >>{marks}\n$ssh "$@"; r=$?\necho - >>{marks}\nexit $r')
    assert repo.exec("true").code == 0
    meet = "touch here-$N; i=0; while [ $(ls here-* | wc -l) -lt 50 ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done; echo met"
    children = [repo.start(f"exec --env N={n} --", meet) for n in range(50)]
    assert [child.end(seconds=150).ended for child in children] == [(0, b"met\n", b"")] * 50
    under_way = most = 0
    for mark in marks.read_text().split():
        under_way += 1 if mark == "+" else -1
        most = max(most, under_way)
    numbers = [int(n) for n in re.findall(r"Starting session: .* id (\d+)", site.log())]
    assert most <= 8 and under_way == 0 and marks.read_text().count("+") <= 15  # 7 are enough; 8 may be under way
    assert len(numbers) >= 50 and max(numbers) < 8
    assert "drop connection" not in site.log() and "no more sessions" not in site.log()


def test_a_dropped_handshake_is_forgotten(repo, site, line):
    ssh_without_masters(site)
    repo.new(host="far")
    line.away = (1, b"")
    assert repo.exec("true", host="far").code == 0 and line.away[0] == 0

    def at_once(least, most):
        line.stall()
        line.connections = 0
        children = [repo.start("exec -- true") for _ in range(12)]
        until(lambda: line.connections >= least)
        sleep(1)
        assert line.connections <= most
        line.go_on()
        assert [child.wait(60) for child in children] == [0] * 12
    at_once(2, 4)
    for file in site.state.rglob("*"):
        os.utime(file, (time.time() - 70,) * 2)
    at_once(8, 8)


@each("what", ["slot", "handshake", "lock", "host that is down"])
def test_waiting_costs_nothing_and_ends_at_once(repo, what, site, line):
    repo.new(host="far")
    line.refuse = "slot" in what  # no second connection
    if what == "handshake":
        ssh_without_masters(site)
        site.entries.insert(0, "Host far\n  ConnectTimeout 120\n")  # longer than the wait until it is quiet
        site._write_config()
    if what in ("handshake", "lock"):
        line.stall()
    repo.start("new other -H far") if what == "lock" else None
    site.at("down", free_port())
    for _ in range(4 if what == "host that is down" else 0):
        assert repo.cli("new other -H down").code == 255
    assert in_library(repo, """
import os, resource
project, cancel, stop, what = Project(".", warm=0), Cancel(), Cancel(), sys.argv[1]
pool, slots = ThreadPoolExecutor(50), "slot" in what
if slots or what == "handshake":
    workspace = project.workspace("main")
    held = [pool.submit(workspace.exec, "sleep 60", cancel=cancel) for _ in range(8)]
    wait = lambda: workspace.exec("cat", cancel=stop).exit_code
    time.sleep(1.5)
else:
    wait = lambda: project.create("other", "box" if what == "lock" else "down", cancel=stop)
waiting = [pool.submit(wait) for _ in range(40)]
for _ in range(20):                        # until all wait, each looking once a second
    switches, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.process_time()
    time.sleep(1)
    cpu, switches = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - switches
    quiet = cpu < 0.05 and switches < 500
    if quiet:
        break
print(quiet or (cpu, switches), sum(one.done() for one in waiting))
began = time.monotonic()
if slots:                                  # what is freed goes to those who wait, at once
    cancel.set()
    print({one.result() for one in waiting}, end=" ")
    took, began = time.monotonic() - began, time.monotonic()
    list(pool.map(lambda _: wait(), range(40)))
    print(took < 2 * (time.monotonic() - began) + 5)
else:
    stop.set()
    print({type(one.exception()).__name__ if what != "handshake" else one.result() for one in waiting}, time.monotonic() - began < 8)
cancel.set()
if what == "handshake":                    # the commands that could not begin are asked after for long
    sys.stdout.flush()
    os._exit(0)
""", what).splitlines() == ["True 0", {"slot": "{0} True", "handshake": "{130} True"}.get(what, "{'Cancelled'} True")]


@each("way", ["one master", "MaxSessions 1", "own masters"])
def test_commands_that_stream_do_not_wait_for_each_other(site, way, repo):
    """Each needs two: all held one, and waited for the next."""
    site.daemon("few", way if way == "MaxSessions 1" else "")
    if way == "own masters":
        ssh_without_masters(site)
    line = site.line("far", to="few")
    repo.new(host="far")
    line.refuse = way == "one master"  # another cannot be had
    assert in_library(repo, """
together, workspace = threading.Barrier(16), here(warm=0)
def run(number, stdin):
    together.wait()
    done = workspace.exec("sleep 1; cat; exit %d" % number, stdin=stdin and bytes(range(256)) * number)
    return (done.exit_code, done.stdout) == (number, bytes(range(256)) * number)
with ThreadPoolExecutor(16) as pool:
    list(pool.map(run, range(16), [b""] * 16))      # as many connections as there can be
    print(list(pool.map(run, range(16), [b"some"] * 16)).count(True))
""") == "16\n"


@each("sh", ["dash", "bash"])
def test_a_host_of_few_processes_is_given_fewer(site, sh, repo):
    """(The limit binds no root: the account is another.)"""
    uid = 60000 + os.getpid() % 5000
    login = site.script("few", f"exec {program('setpriv')} --reuid {uid} --clear-groups bash -c 'ulimit -u 26; exec {program(sh)} -c \"$SSH_ORIGINAL_COMMAND\"'")
    site.inetd("few", f"ForceCommand {login}")
    for path in (site.dir, site.remote):
        path.chmod(0o755)
    os.chown(site.far_home("few"), uid, -1)
    repo.new(host="few")
    rows = repo.cli("batch -j 40", stdin=calls([["sleep", "1"]] * 40, workspace="main"), seconds=120).rows
    assert [row["ok"] and row["result"]["exit_code"] for row in rows] == [0] * 40


def test_a_line_that_is_slow_or_stalls_loses_nothing(repo, line):
    data = os.urandom(1 << 20)
    line.delay = 0.025
    assert repo.exec("cat", host="far", stdin=data[:1 << 18]).ended == (0, data[:1 << 18], b"")
    line.delay = 0.0
    child = repo.start("exec -H far -- cat", stdin=PIPE)
    line.stall()
    Timer(1.5, line.go_on).start()
    assert child.end(data).ended == (0, data, b"")


def test_a_header_that_was_cut_off_is_sent_again(repo, site, own):
    own("exec", command="true")
    four_ready(site)
    (master,) = site.masters()
    kill(master.pid, SIGSTOP)
    Timer(1, kill, (master.pid,)).start()
    assert own("exec", command=["echo"] + ["x" * 100000] * 2, timeout=30)["exit_code"] == 0


def test_a_header_cut_at_any_line_runs_nothing(tmp_path):
    rows = c.shell_header("N", "run", c.record("V", "touch ran") + c.record("@", "true") + c.record(".", "")).splitlines(True)
    for at in range(len(rows)):
        assert subprocess.run(c.BOOT, shell=True, input=b"".join(rows[:at]), cwd=tmp_path, stdout=DEVNULL).returncode == 97 and not os.listdir(tmp_path)


@each("sessions", [1, 2])
def test_waiting_sessions_block_no_small_host(site, sessions):
    site.daemon("few", f"MaxSessions {sessions}")
    assert in_library(Repo(site), """
first = here("few")
first.exec("true")
time.sleep(1)
began = time.monotonic()
second = here(warm=0)
print(second.exec("exit 4").exit_code, first.exec("exit 5").exit_code, time.monotonic() - began < 40)
""") == "4 5 True\n"


def test_two_clones_may_send_one_tree_at_once(site):
    """The lock of an upload is one repository's: the host sees to it itself."""
    repo = Repo(site, files={f"d/{n}": b"%d" % n for n in range(30)})
    repo.git("clone -q .", str(site.dir / "other"))
    assert in_library(repo, """
import subprocess
places = [".", sys.argv[1]]
projects = [Project(place) for place in places]
class Said(Report):
    def warn(self, text):
        print(text)
for turn in range(10):
    for place in places:
        subprocess.run(f"echo {turn} >u; git add -A; GIT_AUTHOR_DATE=@1700000000 GIT_COMMITTER_DATE=@1700000000 git commit -qm y",
            shell=True, cwd=place, check=True)
    together = threading.Barrier(2)
    def make(project):
        together.wait()
        return project.create(f"w{turn}", "box", report=Said()).exec("git status --porcelain && cat u").stdout
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(make, projects)) == [b"%d\\n" % turn] * 2
""", str(site.dir / "other")) == ""
    bases = site.far_home() / "cmux" / ".cmux" / "bases"
    assert all((base / "whole.tar").is_file() for base in bases.iterdir())


def test_a_failed_second_connection_makes_no_host_down(repo, line, nap):
    repo.new(host="far")
    child = repo.start("batch -j 9", stdin=PIPE)
    for commands in ([nap] * 8, ["true"]):
        child.say(calls(commands, workspace="main"))
        nap.runs(8)
        line.refuse = True
    tried = line.connections
    until(lambda: line.connections == tried + 3)  # for four seconds not again
    for process in running(nap):
        kill(process.pid)
    child.communicate()
    assert repo.cli("list --json").json[0]["changed"] == 0


def test_no_master_is_tried_twice_ahead(repo, site, own):
    """It is tried once: where logging in needs a person, each try is a failed login and its penalty."""
    own("exec", command="true")
    four_ready(site)
    (site.dir / "authorized").write_text("")
    before = site.log().count("Connection from ")
    with Agent(repo) as second:
        for _ in range(5):
            second("exec", command="true")
            sleep(1.6)  # longer than the pause after a failure
        assert site.log().count("Connection from ") == before + 1
        assert (open_sessions(site), len(site.masters())) == (4, 1)


# === new: uploads and the init hook ===


def test_two_projects_of_one_name_never_meet(site):
    one, two = Repo(site, "a/project", files={"who": b"one"}), Repo(site, "b/project", files={"who": b"two"})
    assert one.exec("cat who").out == b"one" and two.exec("cat who").out == b"two"
    assert one.path().parent != two.path().parent and set(one.workspaces()) == {"main"}
    assert len(one.cli("list --all-projects --json").json) == 2


def test_a_subdirectory_is_the_same_project(repo, common):
    repo.new()
    before = common.cli("-C", str(repo.dir), "-w", "main", "--json", "exec", "--", "echo", "-C", "x")  # as git has it
    assert before.json["stdout"] == "-C x\n"
    assert common.cli("exec --", "ls README", cwd=repo.dir / "src").out == b"README\n"
    assert common.cli("list -C", str(repo.dir / "src"), "--json").json == repo.cli("list --json").json != []


@each("how, at", [("cut", 20_000), ("cut", 300_000), ("cut", 1_500_000), ("killed", 100_000), *(
    (how, at) for how in ("compressed, cut", "compressed, killed") for at in (400_000, 1_100_000, 1_400_000))])
@promise(7)
def test_an_upload_cut_in_the_middle_leaves_nothing(repo, at, how, site, line):
    repo.save("big", source_text(6 << 20) if "compressed" in how else os.urandom(2 << 20))
    if "compressed" in how:
        line.rate, line.delay = 4e6, 0.005
    if "cut" in how:
        line.cut["up"] = at
        refused(repo.cli("new -H far a"), 255)
    else:
        child = repo.start("new -H far a")
        until(lambda: line.up > at)
        line.stall()
        kill(child.pid)
        child.communicate()
        line.drop()
    assert repo.workspaces() == {} and not list(site.far_home().glob("cmux/project-*/*"))
    line.go_on()
    line.cut["up"], line.rate, line.delay = None, float("inf"), 0.0
    repo.new("a", host="far")
    repo.arrived("a")


def test_an_archive_kept_otherwise_is_refused(repo, site):
    site.daemon("odd", env=replaced(site, tee=f'{program("tee")} "$@"; echo >>"$1"; exit'))
    refused(repo.cli("new -H odd main"), 1, "arrive whole")


def source_text(size):
    """Lines that compress as source text does, to a fifth or so, and are no two times the same."""
    words = iter(random.choices([os.urandom(3).hex() for _ in range(200)], k=size // 30 * 4))
    return "".join(map("    %s = %s(%s, %s)\n".__mod__, zip(words, words, words, words))).encode()[:size]


@pytest.fixture
def tuned(site, monkeypatch):
    """Other limits for the program from now on, or another line of it."""
    def tune(line="", **limits):
        path = site.dir / "tuned.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport cmux_ssh as c\n{line}\n" + "".join(
            f"assert c.{name}; c.{name} = {value if isinstance(value, int) else f'float({str(value)!r})'}\n" for name, value in limits.items()) + "sys.exit(c.main())\n")
        monkeypatch.setattr(sys.modules[__name__], "PROGRAM", path)
    return tune


def test_over_a_long_line_all_travels_compressed(repo, line):
    repo.save({name: source_text(1 << 20) for name in "abcdef"})
    line.rate, line.delay = 4e6, 0.005
    assert "compressed to" in repo.ok("new -v -H far w").said and tree_of(repo.path("w")) == repo.tree()
    assert line.up < 4 << 20


SHIFT = '''#!{python}
import io, os, subprocess, sys, tarfile, time
if "archive" not in sys.argv[1:]:
    os.execv("{git}", ["git"] + sys.argv[1:])
old = tarfile.open(fileobj=io.BytesIO(subprocess.run(["{git}"] + sys.argv[1:], stdout=subprocess.PIPE, check=True).stdout))
new = tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.GNU_FORMAT)
for member in old:
    member.mtime = time.time() + 864000
    new.addfile(member, old.extractfile(member) if member.isfile() else None)
new.close()
'''


@each("host", ["box", "bare", "bsdtar"])
def test_files_are_as_old_as_the_host_says(site, host):
    """git archives a tree with the time of now: in the host's future, make would rebuild for ever."""
    if host == "bare":
        small_host(site)
    if host == "bsdtar":
        site.inetd("bsdtar", env=replaced(site, tar=f'exec {program("bsdtar", "libarchive-tools")} "$@"'))
    repo, shim = Repo(site, odd=True), site.dir / "shim" / "git"
    shim.parent.mkdir()
    shim.write_text(SHIFT.format(python=sys.executable, git=program("git")))
    shim.chmod(0o755)
    env = {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    for name in ("first", "second"):
        repo.new(name, env=env, host=host)
    repo.write("plain.txt", b"changed\n")
    repo.save("sub/new", b"new\n")
    repo.ok("push -w first", env=env)
    repo.new("third", env=env, host=host)
    for name in ("first", "second", "third"):
        files = [path for path in repo.path(name).rglob("*") if not path.is_symlink() and ".git" not in path.parts]
        assert files and all(path.stat().st_mtime < time.time() + 1 for path in files), name
        if host != "bare":
            clean = subprocess.run(["git", "diff-files", "--quiet"], cwd=repo.path(name), env={"PATH": os.environ["PATH"]}, check=False)
            assert clean.returncode == 0, "the index knows the files without a look at their content"


def test_a_bar_tells_bytes_rate_and_time(repo, line):
    name = "a-rather-long-name-of-a-workspace-that-somebody-gave-it-in-1999"
    repo.save("big", os.urandom(5 << 20))
    line.rate = 2e6
    seen = repo.terminal("new -H far", name)
    seen.expect(rb"\ra-rather[-a-z]*  sending [\d.]+ MB of ~5.\d MB, [\d.]+ [kM]B/s, ~\d+s left")
    assert all(len(text) < 100 for text in seen.lines())
    assert seen.wait() == 0
    assert not [text for text in seen.lines() if "sending" in text]
    assert repo.exec("head -c 3000000 /dev/urandom >result", host="far", options=["-w", name]).code == 0
    seen = repo.terminal("pull -w", name).talk(rb"  receiving [\d.]+ [kM]B, [\d.]+ [kM]B/s")
    assert b"sending" not in seen.output and not [text for text in seen.lines() if "receiving" in text]
    line.rate = 4e6
    assert b"sending" not in repo.cli("new -H far --root other b").err


def test_a_stalled_upload_holds_up_no_other_host(repo, tuned, line):
    repo.save("text", os.urandom(1 << 20))
    repo.new("old", "older", "--ref", "HEAD~1")
    stopped = Event()
    line.trap = ("up", 300_000, lambda: (kill(sender.pid, SIGSTOP), stopped.set()) and None)
    sender = repo.start("new -H far a")
    until(stopped.is_set)
    tuned(LOCK_PATIENCE=2.5)
    calls = ("new -v -H far c", "new -H box a", "rm a", "rename -w old a", "fork -w older a", "exec -v -H box -w a -- true")
    for words, waited in zip(calls, at_once(len(calls), repo.cli, calls)):
        who = f"process {sender.pid}, which {'sends the same files to far' if 'far' in words else 'works on the workspace a'}."
        assert waited.code == (125 if "exec" in words else 1) and waited.out == b"" and 2 < waited.seconds < 15
        assert (f"Waiting for {who}" in waited.said) == ("-v" in words), "in a pipe it adds no word"
        assert f"Waited 2 seconds in vain for {who}" in waited.said
    assert repo.new("b").seconds < 15
    kill(sender.pid, SIGCONT)
    assert sender.wait(60) == 0


HOOK = b'#!/bin/sh\necho "init in $CMUX_WORKSPACE with <$TOKEN>"\necho to-stderr >&2\necho once >>init-ran\n'


def test_an_init_hook_runs_once_and_undoes_nothing(repo):
    repo.save(".cmux/init", HOOK, 0o755)
    repo.secret("TOKEN", b"tok")
    made = repo.new("a")
    assert b"init in a with <tok>" in made.out + made.err and b"to-stderr" in made.out + made.err
    assert repo.exec("cat init-ran", options="-w a").out == b"once\n"
    repo.new("b", "--no-init")
    repo.save(".cmux/init", HOOK, 0o644)
    repo.new("c")  # where it is only a file
    assert not [name for name in "bc" if (repo.path(name) / "init-ran").exists()]
    repo.save(".cmux/init", HOOK + b"exit 9", 0o755)
    first = repo.exec("echo output", options="-w e")
    assert first.code == 0 and first.out.endswith(b"output\n") and "init hook of e failed with status 9" in first.said
    assert repo.cli("new f -H box --json").json[0]["state"] == "init failed"
    quiet = repo.ok("new g -H box -q")
    assert quiet.out == b"" and quiet.said == "cmux_ssh.py: The init hook of g failed with status 9.\n" == repo.exec("true", options="-q -w q").said.replace("of q", "of g")
    with Mcp(repo, "-w h -H box") as client:
        assert "init hook of h failed with status 9" in client("exec", command="true")
    assert "hook of i failed" in repo.cli("batch -w i -H box", stdin=b'{"tool": "jobs"}').said


@promise(4)
def test_exec_without_any_host_says_how_to_name_one(repo, site):
    """A repository cannot name it."""
    repo.save(dict.fromkeys((".cmux/config", ".cmux/host", ".cmuxrc", ".cmux.json", ".cmux/config.json"), b'{"host": "box"}\nhost = box\n'))
    refused(repo.cli("exec -- true"), 125, "-H")
    assert not site.log().count("Accepted publickey")


def test_a_record_with_wrong_parts_is_left_alone_and_disturbs_no_other(repo, site):
    repo.new()
    other = site.state / "projects" / "zz.json"
    other.write_text("damaged")
    other.chmod(0o600)
    everything = repo.cli("list --all-projects")
    assert "main" in everything.text and "is damaged" in everything.said
    other.unlink()
    good = json.loads(repo.record().read_text())
    entry = good["workspaces"]["main"]

    def listed(**more):
        repo.record().write_text(json.dumps({**good, **more}))
        return repo.cli("list")
    for more in ({"name": "../x"}, {"id": "x"}, {"workspaces": []}, *({"workspaces": wrong} for wrong in (
            {"../x": entry}, {"main": 1}, *({"main": {**entry, **part}} for part in ({"created": "now"}, {"path": None}, {"state": None})))),
            {"jobs": []}, {"jobs": {"j0": {"command": "x"}}}, {"places": [["a"]]}, {"sent": [["a", 1]]}, {"sent": {}}):
        refused(listed(**more), 1, "is damaged. Repair it, or set it aside")
        assert json.loads(repo.record().read_text()) == {**good, **more}
    half = {key: value for key, value in entry.items() if key != "path"}
    assert "main" in listed(workspaces={"main": entry, "half": {**half, "state": "creating"}}).text
    for part in ("jobs", "places", "sent"):
        good.pop(part, None)
    assert "main" in listed().text


def test_too_many_lines_are_refused_not_cut(shared):
    do(shared, "head -c 12000000 /dev/zero | tr '\\0' x >long.txt; seq 1 2500000 >seq.txt")
    for path, limit in (("long.txt", "1"), ("seq.txt", "2400000")):
        refused(shared.cli("read -w main", path, "--limit", limit), 1, "Ask for fewer")
    assert shared.cli("read -w main seq.txt --offset 2000000 --limit 2").text == "2000000\n2000001\n"
    do(shared, "rm long.txt seq.txt")


def test_an_interrupted_init_hook_is_no_success(repo, nap):
    repo.save(".cmux/init", f"#!/bin/sh\n{nap}\n".encode(), 0o755)
    child = repo.start("new -H box killed")
    nap.runs()
    assert repo.workspaces()["killed"]["state"] == "init running"
    killed(child)
    assert repo.workspaces()["killed"]["state"] == "init failed"
    for names in ("one", "two three"):
        nap.gone()
        child = repo.start(f"new -H box {names}")
        nap.runs(len(names.split()))
        child.send_signal(SIGINT)
        refused(child.end(), 130, "interrupted")
    nap.gone()
    assert [row["state"] for row in repo.cli("list --json").json] == ["init failed"] * 4


def test_aliases_of_one_address_share_no_connection(repo, site):
    used = site.dir / "used"
    site.at("one")
    proxy = script(site.dir / "relay", f"echo used >>{used}\nexec {program('ssh')} -F {site.config} -W 127.0.0.1:{site.port} box")
    site.at("two", None, f"ProxyCommand {proxy}")
    assert repo.exec("true", host="one", options="-w a").code == 0 and not used.exists()
    assert repo.exec("true", host="two", options="-w b").code == 0 and used.exists()


# === push and --dirty ===


CLEAN = "s=$(git status --short) && [ -z \"$s\" ]"
@each("force", [False, True])
def test_what_was_killed_on_the_host_is_finished(site, force):
    """They find a tree in the stage, which must not take the next one in; and files that are half changed, by the first, not by the agent."""
    repo, armed = Repo(site, files={f"many/{n}": b"old\n" for n in range(30)}), site.dir / "armed"
    end = """p=$$ all=
while p=$(($(ps -o ppid= -p $p))) && [ "$(ps -o comm= -p $p)" = sh ]; do all="$p $all"; done; kill -9 $all; exit 1; fi;; esac"""
    site.daemon("killed", env=replaced(site, mv=f"""case $1 in */stage/*/????????????????) if rm {armed} 2>/dev/null; then {program("mv")} "$@"; {end}""",
        git=f"""case "$*" in *'read-tree --reset -u'*) if rm {armed} 2>/dev/null; then for f in many/1*; do echo new >$f; done; {end}"""))
    armed.touch()
    repo.new(host="killed")
    assert not armed.exists() and tree_of(repo.path()) == repo.tree()
    repo.save({f"many/{n}": b"new\n" for n in range(30)})
    if force:
        do(repo, "echo agent >agents")
    armed.touch()
    repo.ok("push", *(["--force"] if force else []))
    assert not armed.exists()
    path = Path(repo.workspaces()["main"]["path"].replace("~", str(site.far_home("killed"))))
    assert {file.read_bytes() for file in (path / "many").iterdir()} == {b"new\n"}
    do(repo, CLEAN)
    nothing_new(repo)
    kept = list((path.parents[1] / ".cmux" / "trash").glob("kept-*"))
    assert len(kept) == force and all((path / "agents").read_bytes() == b"agent\n" and (path / "many/1").read_bytes() == b"old\n" for path in kept)


def test_push_leaves_a_readable_split_index(repo):
    repo.save({f"f{n}.txt": b"x%d\n" % n for n in range(30)})
    repo.new()
    do(repo, "sleep 1.5; git status; git update-index --split-index; ls .git | grep shared; git status --short")
    repo.save({f"f{n}.txt": b"new\n" for n in range(20)})
    repo.ok("push")
    do(repo, CLEAN)


@each("everywhere", [False, True])
def test_dirty_goes_by_attributes_and_ignores(repo, everywhere):
    ignored = repo.dir.parent / "ignore everywhere" if everywhere else repo.dir / ".myignore"
    ignored.write_text("private.txt\n")
    (repo.dir / ".git" / "attrs").write_text("*.z filter=crypt\n*.txt text\n")
    repo.git("config core.attributesFile", str(repo.dir / ".git" / "attrs"))
    repo.git("config core.excludesFile", str(ignored) if everywhere else ".myignore")
    repo.write("private.txt", b"p")
    repo.write("lines.txt", b"a\r\n")
    repo.new("main", "--dirty")
    assert not (repo.path() / "private.txt").exists() and repo.far("lines.txt") == b"a\n"
    repo.git("config filter.crypt.clean rev")
    repo.write("key.z", b"topsecret")
    repo.ok("push --dirty")
    assert b"terces" in repo.far("key.z")


def test_what_was_dirty_is_not_the_agents(repo):
    repo.write("mine", b"edited\n")
    repo.new("--dirty", "main")
    do(repo, "echo 1 >agents")
    repo.ok("pull")
    repo.git("checkout cmux/main -- agents")
    (repo.dir / "mine").unlink()
    repo.git("commit -qm", "took agents")
    repo.ok("push")
    do(repo, "echo 2 >second")
    repo.ok("pull")
    assert repo.pulled("second") == "2"


def test_what_is_not_sent_is_said_each_time(repo):
    content = b"large" * 1000
    repo.save({"a.bin": pointer(content), ".gitattributes": b"*.bin filter=lfs\n*.txt text\n", **dict.fromkeys(("staged", "back.txt", "gone"), b"a\nb\n")})
    repo.git("config core.autocrlf true")
    for name, data in (("a.bin", content), ("back.txt", b"a\r\nb\r\n"), ("staged", b"new\n")):
        repo.write(name, data)
    repo.git("add staged")
    repo.write("staged", b"a\nb\n")  # as in HEAD again: --dirty would send nothing of it
    for name in ("README", "nonce", "src/main.c", "a.bin"):
        os.utime(repo.dir / name, (1, 1))
    for words in ("new -H box one", "new -H box two three", "push -w one"):
        said = repo.ok(words).said
        assert said.count("Not sent") == 1 and "Not sent: 1 LFS file without content" in said and "uncommitted" not in said
    repo.write("README", b"edited\n")
    repo.write("new\nfile", b"untracked")
    (repo.dir / "gone").unlink()
    before, files = (repo.dir / ".git/index").read_bytes(), "3 uncommitted files"
    for words in ("new -H box four", "push -w one", "push --force -w two", "batch -w seven -H box", "exec -w eight -H box true"):
        assert f"{files} (--dirty sends them)." in repo.cli(words, stdin=b'{"tool": "jobs"}').said, words
    with Mcp(repo, "-w five -H box --manage") as client:
        assert files in client("exec", command="true")
        assert files in client("workspace_new", name="six") and files in client("workspace_push", workspace="one", force=True)
    assert (repo.dir / ".git/index").read_bytes() == before
    repo.git("checkout -q a.bin")
    assert "Not sent: 1 LFS file" in repo.cli("push -w one --dirty").said


def test_push_keeps_what_is_ignored(site, place):
    repo = Repo(site, odd=True, files={".gitignore": b"*.o\n", "keep": b"k\n", "f1": b"1", "f2": b"2", "f3": b"3"})
    repo.new(host=place)
    if place == "box":  # without git, nobody there knows what is ignored
        do(repo, "echo o >x.o")
    before = os.stat(repo.path() / "keep").st_mtime_ns
    for name in ("plain.txt", "sub/dir/deep.txt", "link"):
        (repo.dir / name).unlink()
    repo.write("plain.txt/now a dir", b"d")
    repo.write("new/file", b"n", 0o755)
    (repo.dir / "link").symlink_to("keep")
    repo.save("run.sh", b"changed", 0o644)
    repo.ok("push -v")
    there = tree_of(repo.path())
    assert (there.pop(b"x.o", None) is None) == (place != "box") and there == repo.tree()
    assert not (repo.path() / "sub/dir").exists()
    if place == "box":
        assert os.stat(repo.path() / "keep").st_mtime_ns == before
        assert repo.cli("exec -w main --", "git status --short").out == b""
    again = repo.cli("push")
    assert repo.cli("diff").out == b"" and "already" in again.text and again.said == ""
    do(repo, "echo lost >lost")
    refused(repo.cli("push --ref HEAD~1"), 1, "lost")
    assert "kept" in repo.ok("push --ref HEAD~1 --force").said and not (repo.path() / "lost").exists()
    trash = repo.path().parents[1] / ".cmux/trash"
    assert list(trash.glob("kept-*/lost"))
    repo.ok("gc")
    assert not list(trash.iterdir())


@compat
def test_a_delta_sends_only_what_changed(site, line):
    repo = Repo(site, odd=True, files={f"big{i}": os.urandom(30000) for i in range(20)})
    repo.new("one", host="far")
    line.up = 0
    repo.new("same", host="far")
    repo.arrived("same")
    assert line.up < 64 << 10
    (repo.path("same") / "big0").write_bytes(b"edited in place")
    repo.new("whole", host="far")
    repo.arrived("whole")
    for turn in range(9):
        repo.write("sub/turn", b"%d" % turn)
        if turn == 3:
            (repo.dir / "native.txt").unlink()
        repo.commit()
        before = line.up
        repo.new("t%d" % turn, host="far")
        sent = line.up - before
        repo.arrived("t%d" % turn)
        assert sent < 50000
    assert repo.cli("exec -w t2 --", "git status --short; git log --format=%s").out == b"base\n"
    repo.ok("gc")
    repo.new("--ref", "HEAD~3", "again", host="far")
    repo.save(".cmux-gone", b"README\n")  # as our list of deletions is called: all is sent
    repo.new("own", host="far")
    repo.arrived("own")


def test_a_delta_of_few_files_goes_by_bytes(site):
    repo = Repo(site, files={"blob": os.urandom(3000000)})
    repo.new("one")
    for turn in range(3):
        repo.save({"t": b"%d" % turn, "README": b"%d" % turn})  # two of three files: few bytes, but most of them
        repo.ok("push -w one")
        assert [row["bytes"] < 50000 for row in repo.history() if row["operation"] == "push"][-1]
    repo.save("blob", os.urandom(3000000))
    repo.ok("push -w one")
    repo.arrived("one")
    repo.save({f"vendor/{n}": b"x" for n in range(1200)})
    repo.new("--root", "other", "two")
    repo.git("rm -rq vendor")
    repo.commit()
    repo.new("--root", "other", "three")
    repo.arrived("three")


@each("host", ["box", "bare"])
@promise(7)
def test_push_looks_again_after_its_upload(site, host, repo):
    bare_host(site)
    site.daemon("bare", env={"PATH": str(site.dir / "posix-bin")})
    line = site.line("far", to=host)
    repo.new(host="far")
    note = repo.path() / "note"
    repo.save("more", os.urandom(2 << 20))
    line.trap = ("up", 500_000, lambda: note.write_bytes(b"agent's"))
    refused(repo.cli("push"), 1, "note")
    assert note.read_bytes() == b"agent's" and not (note.parent / "more").exists()
    repo.ok("pull")
    assert repo.pulled("note") == "agent's"
    repo.ok("push")
    assert tree_of(note.parent) == repo.tree()


@each("harm", ["rm -rf .git; git init -q -b main; git add -A; git commit -qm anew",
    "rm -rf .git; git init -q --object-format=sha256 -b main; git add -A; git commit -qm anew",
    "touch .git/HEAD.lock", "touch .git/refs/heads/main.lock", "git branch -m main/sub",
    "git checkout -q --detach; touch .git/refs/heads/main.lock"])
def test_push_force_replaces_what_cannot_be_moved(repo, harm, site):
    repo.save(".gitignore", b"ignored\n")
    repo.new()
    do(repo, "git config --global user.name a; git config --global user.email a@x; echo agent >>README; echo cache >ignored; " + harm)
    repo.ok("pull")
    before = {path.name: path.read_bytes() for path in repo.path().iterdir() if path.is_file()}
    repo.save("more", b"user")
    head = repo.far(".git/HEAD")
    refused(repo.cli("push"), 1, "cannot be moved")
    assert repo.far(".git/HEAD") == head
    assert {path.name: path.read_bytes() for path in repo.path().iterdir() if path.is_file()} == before, "all is as it was"
    assert "is kept until gc" in repo.ok("push --force").said
    assert repo.far("more") == b"user" and b"agent" not in repo.far("README")
    do(repo, f"[ ! -e .git/HEAD.lock ] && {CLEAN}")
    do(repo, "echo again >>more; git commit -qam again")
    repo.ok("pull --branch second")
    assert repo.git("log --format=%s main..second") == "again"


def test_an_index_hides_nothing(repo):
    repo.save(".gitignore", b"*.log\n")
    repo.new()
    do(repo, "git config core.splitIndex true; git add -f .; echo keep >result.log; git add -f result.log; ls .git/sharedindex.*; "
        "git update-index --assume-unchanged README; git update-index --skip-worktree src/main.c; echo changed >README; echo changed >src/main.c")
    refused(repo.cli("rm main"), 1, "result.log", "README")
    repo.ok("pull")
    assert repo.pulled("result.log") == "keep" and repo.pulled("README") == "changed"
    if tuple(map(int, re.findall(r"\d+", repo.git("version"))[:2])) >= (2, 36):  # older ones believe skip-worktree
        assert repo.pulled("src/main.c") == "changed"


def test_a_merge_comes_home_as_one(repo):
    repo.new()
    do(repo, "git checkout -qb side; echo s >side; git add .; git commit -qm side; git checkout -q main; echo x >x; git add .; "
        "git commit -qm x; git merge -q -m merged side; echo y >y")
    there = tree_of(repo.path())
    repo.ok("pull")
    assert repo.git("log --format=%s main..cmux/main").split("\n")[:2] == ["uncommitted work", "merged"]
    repo.git("checkout -q -f cmux/main")
    assert repo.tree() == there


def test_work_that_a_push_left_behind_is_set_aside(repo, common):
    repo.new()
    do(repo, "echo 1 >agents; git add agents; git commit -qm agentwork")
    repo.ok("pull")
    pulled = repo.id("cmux/main")
    repo.save("users", b"u")
    repo.ok("push")
    nothing_new(repo)
    assert repo.id("cmux/main") == pulled
    do(repo, "echo 2 >second")
    assert repo.cli("pull", env=replaced(common, git='case " $* " in *" cmux pull refs/heads/cmux/main "*) kill -9 $PPID; exit 1;; esac')).code == -9
    kept = repo.ok("pull")
    assert repo.id(f"cmux/main-{pulled[:8]}") == pulled and "kept as" in kept.said
    assert repo.changed() == "second"
    repo.git("merge -q --squash cmux/main")  # not as a commit of its history, but it has it
    repo.commit()
    repo.ok("push")
    do(repo, "echo 3 >third")
    assert "kept as" not in repo.ok("pull").said and repo.id("cmux/main~1") == repo.id("main")
    assert repo.changed() == "third"


def test_fork_waits_for_a_push(repo, line):
    forks = []

    def fork():
        forks.append(repo.start("fork -w main side"))
        with suppress(subprocess.TimeoutExpired):
            forks[0].wait(4)
    repo.new(host="far")
    repo.save("more", os.urandom(2 << 20))
    line.trap = ("up", 500_000, fork)
    repo.ok("push")
    assert forks[0].wait(60) == 0 and tree_of(repo.path("side")) == repo.tree()


@each("layout", ["bare", "linked", "separate", "submodule"])
def test_hooks_of_another_layout(repo, layout, common):
    repo.save("hooks/pre-commit", b"#!/bin/sh\n", 0o755)
    other = repo.dir.parent / "other"
    if layout == "bare":
        repo.git("clone -q --bare", str(repo.dir), str(other))
        repo.git("-C", str(other), "config", "core.hooksPath", "hooks")
    else:
        repo.git("config core.hooksPath", str(repo.dir / "hooks"))
    if layout == "linked":
        repo.git("worktree add -q -b side", str(other))
    elif layout == "separate":
        repo.git("init -q --separate-git-dir", str(other))
        other = repo.dir
    elif layout == "submodule":  # which has a configuration of its own
        outer = fresh(common)
        outer.git("-c protocol.file.allow=always submodule --quiet add", str(repo.dir), "sub")
        other = outer.dir / "sub"
    repo.ok("-C", str(other), "new", "-H", "box", "w")
    repo.ok("-C", str(other), "exec", "-w", "w", "--", "echo evil >>hooks/pre-commit; echo >hooks/post-checkout")
    if layout == "submodule":
        repo.ok("-C", str(other), "pull", "-w", "w")
    else:
        refused(repo.cli("-C", str(other), "pull", "-w", "w"), 1, "runs hooks from there")


@promise(1)
def test_dirty_sends_nothing_that_a_filter_encrypts(repo):
    for key, value in (("clean", "rev"), ("smudge", "rev"), ("required", "true")):
        repo.git("config", "filter.crypt." + key, value)
    repo.write(".gitattributes", b"*.z filter=crypt\n")
    repo.save("key.z", b"topsecret\n")
    os.utime(repo.dir / "key.z", (1, 1))
    repo.write("other", b"o")
    repo.write("new.z", b"topsecret\n")
    repo.new("--dirty", "main")
    assert {repo.far(name) for name in ("key.z", "new.z")} == {b"tercespot\n"}
    repo.git("config filter.crypt.clean false")
    repo.write("new.z", b"topmost\n")
    refused(repo.cli("push --dirty"), 1, "'crypt' failed")
    assert repo.far("new.z") == b"tercespot\n"


def test_dirty_knows_unchanged_lfs_content(repo):
    content = b"large" * 1000
    repo.write(".gitattributes", b"*.bin filter=lfs\n")
    repo.save("a.bin", pointer(content))
    script(repo.site.dir / "clean", "s=$(cat; echo x); printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:%s\\nsize %d\\n' $(printf %s \"${s%x}\" | sha256sum | cut -c-64) $((${#s}-1))")
    repo.git("config filter.lfs.clean", str(repo.site.dir / "clean"))
    repo.write("a.bin", content)
    repo.write("other", b"o")
    repo.new("--dirty", "main")
    base = repo.git("for-each-ref --format=%(refname) refs/cmux/sent")
    assert repo.git("show", base + ":a.bin") == pointer(content).decode().strip() and repo.git("show", base + ":other") == "o"
    repo.write("a.bin", content + b"more")
    repo.ok("push --dirty")
    assert repo.far("a.bin").endswith(b"size 5004\n")


def test_dirty_reads_line_ends_as_git_add_does(repo):
    repo.write(".gitattributes", b"* text=auto\n")
    repo.save("text", b"a\nb\n")
    repo.git("config core.splitIndex true")
    repo.git("update-index --split-index")
    repo.git("config core.eol crlf")
    repo.git("config core.fileMode false")
    repo.write("text", b"a\r\nb\r\n", 0o755)
    repo.write("other", b"o\r\n")
    repo.new("--dirty", "main")
    base = repo.git("for-each-ref --format=%(refname) refs/cmux/sent")
    assert repo.git("diff --name-only HEAD", base) == "other" and repo.far("other") == b"o\n"


@each("empty", [False, True])
def test_dirty_names_a_repository_inside(repo, empty, common):
    inner = Repo(common, f"{repo.dir.relative_to(common.dir)}/in ner")
    if empty:
        inner.git("update-ref -d HEAD")
    refused(repo.cli("new --dirty -H box w"), 1, "'in ner' is a repository of its own. Let .gitignore cover it")
    repo.write(".gitignore", b"in ner/\n")
    repo.ok("new --dirty -H box w")


# === pull and diff (promise 3) ===


def test_a_name_used_again_pulls_onto_its_branch(repo):
    for turn in range(2):
        repo.new("again")
        do(repo, f"echo {turn} >f{turn}", "again")
        assert f"cmux/again: 1 commit on {repo.git('rev-parse', 'main')[:10]}" in repo.ok("pull -w again").text
        repo.save("own", b"%d" % turn)
        repo.git("merge -q cmux/again")
        repo.ok("rm again")
    assert repo.pulled("f1", "again") == "1" and repo.pulled("f0", "again") == "0"
    repo.new("again")
    do(repo, "echo x >x", "again")
    repo.ok("pull -w again")
    repo.ok("rm again")  # not merged
    repo.new("again")
    do(repo, "echo y >y", "again")
    refused(repo.cli("pull -w again"), 1, "no pull of this workspace made")


def test_diff_has_the_colour_and_pager_of_git(repo, site):
    repo.new()
    do(repo, "printf 'x\\033]0;evil\\007\\n' >>README; seq 20000 >many")
    pager, got = site.script("pager", 'cat >"$0.got"; echo "paged $1"'), site.dir / "pager.got"

    def shown(config="", **env):
        got.unlink(missing_ok=True)
        (site.home / ".gitconfig").write_text(config)
        output = repo.terminal("diff", env=env).talk().output
        assert b"\x1b]" not in output
        return output, slurp(got)
    out, paged = shown(GIT_PAGER=f"{pager} one")
    assert b"paged one" in out and b"\x1b[32m+x" in paged and b"\x1b]" not in paged and b"evil" in paged and b"+x" not in out
    both = f"[core]\npager = {pager}\n[pager]\ndiff = {pager} two\n[color]\n"
    out, paged = shown(both + "diff = false", GIT_PAGER="")
    assert not paged and b"\n+x" in out, "GIT_PAGER comes first"
    site.env.pop("GIT_PAGER")
    out, paged = shown(both + "ui = never")
    assert b"paged two" in out and b"\n+x" in paged and b"\x1b" not in paged
    out, paged = shown(f"[core]\npager = {pager}\n[pager]\ndiff = false")
    assert not paged and b"\x1b[32m+x" in out
    assert b"\x1b[32m+2\x1b" in shown("[core]\npager = head -n 40")[0], "left early"
    assert b"\x1b]0;evil" in repo.ok("diff").out and not got.exists()
    assert b"^[]0;evil" in repo.terminal("read README").talk().output


def test_diff_into_a_pipe_or_json_can_be_applied(repo):
    repo.save("crlf.txt", b"a\r\nb\r\n")
    assert repo.exec("printf 'a\\r\\nB\\033[1m\\r\\n' >crlf.txt; head -c 3000 /dev/urandom >data.bin; printf end >noeol").code == 0
    plain, told = repo.cli("diff").out, repo.cli("diff --json").json
    patch = told["diff"].encode() if "diff" in told else base64.b64decode(told["diff_base64"])
    assert patch == plain
    for data in (plain, patch):
        repo.git("apply -", stdin=data)
        for name in ("crlf.txt", "data.bin", "noeol"):
            assert (repo.dir / name).read_bytes() == repo.far(name), name
        repo.git("checkout -q -- .")
        repo.git("clean -qfd")


PULLER = """
import json, sys, cmux_ssh
for name, value in json.loads(sys.argv[1]).items():
    assert getattr(cmux_ssh, name)
    setattr(cmux_ssh, name, value)
project = cmux_ssh.Project(".")
places = {how: project.create(how, how) for how in ("git", "files")}
print(flush=True)
for how in map(str.strip, sys.stdin):
    try:
        told = cmux_ssh.pull(places[how], "cmux/x").as_dict()
    except cmux_ssh.CmuxError as error:
        told = {"error": [type(error).__name__, str(error)]}
    print(json.dumps(told), flush=True)
"""


def cases(name):
    marks = [mark for mark in getattr(globals()[name], "pytestmark", []) if mark.name == "parametrize"]
    count = 1
    for mark in marks:
        count *= len(mark.args[1])
    return count


# The default Python, and the oldest and newest that pyenv has.
PYTHONS = [sys.executable] + [str(p) for v in ("3.9", "3.13") for p in sorted(Path("~/.pyenv/versions").expanduser().glob(v + ".*/bin/python3"))[-1:]]


class Lab(Repo):
    """A repository, and two hosts, one with git and one without, whose answer to a pull we write ourselves. One process
    pulls whenever we say so; as if a person had logged it in, over one connection: that saves five hundred handshakes."""

    def __init__(self, keys, **limits):
        self.site, self.puller = Site(keys), None
        self.dir, self.limits = self.site.dir / "lab", json.dumps(limits)
        self.dir.mkdir()
        self.git("init -q -b main")
        self.git("config maintenance.auto false")  # of git 2.55: its lock would come and go in the background
        self.save({"README": b"hi\n", "src/a.c": b"a\n", "docs": b"x\n", "back\\slash": b"b\n", ".gitattributes": b"docs export-ignore\n"})
        self.site.env["PYTHONPATH"] = str(HERE)
        for how, more in (("git", ["git"]), ("files", [])):
            self.site.inetd(how, env={"HOME": str(self.site.remote), "PATH": posix_tools(self.site.dir / how, *more, busybox=False)})

    def state(self):
        """Which file each is, and when it was last changed. (git gives an object that it has already the time of now.)"""
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(self.dir) for name in names]
        return {path: (is_.st_ino, is_.st_size, *(() if "/.git/objects/" in path else (is_.st_mtime_ns, is_.st_ctime_ns)))
            for path in paths for is_ in [os.lstat(path)]}

    def say(self, name, chunks, status):
        """Have the host print these chunks, as long as somebody reads."""
        path = self.site.dir / f"{name}.said"
        path.unlink(missing_ok=True)
        self.site.script(name, f"cat {path}; exit {status}")

        if isinstance(chunks, bytes):
            return path.write_bytes(chunks)

        def write():
            rest, given = iter(chunks), []
            for again in range(2):  # what is too much for a shared connection is asked for twice
                with suppress(BrokenPipeError), open(path, "wb", buffering=0) as file:
                    for chunk in given:
                        file.write(chunk)
                    for chunk in rest:
                        if not again:
                            given.append(chunk)
                        file.write(chunk)
                    return
        os.mkfifo(path)
        Thread(target=write, daemon=True).start()

    def pull(self, stream, how="git"):
        """What a pull says when these sections are all that the host tells. Fewer than three: the stream is cut there.
        Without git, the section of the commits is the script's own, and empty."""
        if self.puller is None:
            self.puller = subprocess.Popen([sys.executable, "-c", PULLER, self.limits], cwd=self.dir, env=self.site.env, stdin=PIPE, stdout=PIPE)
            assert self.puller.stdout.readline() == b"\n"
            for folder in self.site.state.glob("m/*"):
                (folder / "person").touch()
            tree = self.git("--git-dir", str(next(self.site.remote.glob("cmux/*/git/.git"))), "rev-parse", "refs/cmux/base^{tree}")
            at = self.site.dir
            for tool, cases in (("git/git", "*' cat-file --batch '*) for a; do case $a in --git-dir=*) a=${a#*=}.again; break;; esac; done; "
                                            f"if mkdir $a; then exec {at}/said0; fi; exec {at}/said2;; "
                                            f"*base^*) echo {HOSTS_BASE.decode()}; echo {tree};; *{{tree}}*|*write-tree*) echo {tree};; *rev-parse*) echo {HOSTS_BASE.decode()};;"),
                                *((f"{how}/{tool}", f"*'{words}'*) exec {at}/said1;; *) exec {program(tool)} \"$@\";;")
                                  for how, tool, words in (("git", "cat", "/changes "), ("files", "tr", r" \n \0 ")))):
                self.site.script(tool, f'case " $* " in {cases} esac')
        parts = [*stream, b"", b""]
        if how == "files" and isinstance(parts[1], bytes):  # one tool says all; the script there ends it
            parts[1] += parts[2]
        for n in range(3):
            self.say(f"said{n}", parts[n], int(n >= len(stream) or len(stream) < 2))
        self.puller.stdin.write(how.encode() + b"\n")
        self.puller.stdin.flush()
        self.told = json.loads(self.puller.stdout.readline())
        return self.told

    def forget(self):
        branch = self.dir / ".git/refs/heads/cmux/x"
        branch.unlink(missing_ok=True)

    def take(self, stream, how="git"):
        """The paths that a pull changed, and their modes."""
        self.forget()
        told = self.pull(stream, how)
        assert "error" not in told
        rows = self.git("diff-tree -r -z --no-renames", told["base"], told["commit"]).split("\0")
        return {path: row.split()[1] for row, path in zip(rows[::2], rows[1::2])}

    def refuse(self, stream, how="git", what=""):
        self.forget()
        before = self.state()
        kind, said = self.pull(stream, how).get("error", ("", "taken"))
        changed = {path for path, _ in self.state().items() ^ before.items()}
        assert (kind, what in said, changed) == ("ResultRefused", True, set()), (kind, said)
        assert said.isprintable()

    def close(self):
        if self.puller:
            self.puller.kill()
            self.puller.communicate()
        self.site.close()


@shared_fixture
def lab(keys):
    with contextlib.closing(Lab(keys)) as opened:
        yield opened


@pytest.fixture
def new_lab(keys):
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(contextlib.closing(Lab(keys, **limits)))


HOSTS_BASE = b"1" * 40  # what the host calls the base


def blob(mark, data):
    return b"", b"", b"%x blob %d\n%s\n" % (mark, len(data), data)


BASE = b"from :0"


def commit(mark, *lines, parent=BASE, message=b"m\n", who=b"A <a@b> 1700000000 +0100",
        more=b""):
    """A commit with changes "M mode :content path", "D path", or what else a host may say."""
    def name(word):
        return HOSTS_BASE if word == b":0" else b"%x" % int(word[1:]) if word[:1] == b":" else word
    data = b"tree %s\n%sauthor %s\ncommitter %s\n%s\n%s" % (b"e" * 40, b"".join(b"parent %s\n" % name(word) for word in parent.split()[1::2]), who, who, more, message)
    return b"%x commit %d\n%s\n" % (mark, len(data), data), b"%x\0" % mark + b"".join(map(row, lines)), b""


def row(line):
    match = re.match(rb"M (\d+) :(\d+) (.*)|D (.*)", line, re.S)
    if not match:
        return line + b"\0"
    if match.group(1):
        return b":000000 %s 0 %x M\0%s\0" % (match.group(1), int(match.group(2)), match.group(3))
    return b":100644 000000 0 0 D\0%s\0" % match.group(4)


def export(*parts):
    return [b"".join(part) for part in zip((b"", b"", b""), *parts)]


def one(path, mode=b"100644", data=b"data\n"):
    return export(blob(1, data), commit(2, b"M %s :1 %s" % (mode, path)))


def files(*lines, contents=(b"x",)):
    """What a host without git says: the same changes of a commit 1, and contents from 1 on."""
    return [b"", b"1\0" + b"".join(map(row, lines)) + b"\0", b"".join(blob(n, data)[2] for n, data in enumerate(contents, 1))]


def test_honest_streams_arrive(lab):
    found = lab.take(export(blob(1, b"new\n"), commit(2, "M 100755 :1 na\u00efve \"q\n".encode(), b"D src/a.c"),
        blob(3, b"../README"), commit(4, b"M 120000 :3 src/l", parent=b"from :2", message=b"no newline")))
    assert found == {'na\u00efve "q\n': "100755", "src/a.c": "000000", "src/l": "120000"}
    lab.git("fsck --strict")
    assert lab.git("log --format=%an|%ae|%at|%s main..cmux/x") == "A|a@b|1700000000|no newline\nA|a@b|1700000000|m"
    found = lab.take(files(b"M 100644 :1 README", "M 100644 :2 new \u00e9//n".encode(), b"M 120000 :3 s/l", b"M 100755 :4 " + b"d" * 120 + b"/" + b"e" * 120,
        b"D docs", b"M 100644 :1 same", contents=[b"hi\n", b"n", b"../README", b"long"]), "files")
    assert found == {"new \u00e9\n": "100644", "s/l": "120000", "d" * 120 + "/" + "e" * 120: "100755", "same": "100644", "docs": "000000"}


EVIL = [b"../x", b"/abs", b".git/hooks/post-checkout", b"a/.git/config", b".git", b"a/../../x", b"a/..", b"./a", b"a//b", b"a/", b"..", b"."]


ODD = [b".GIT/config", b"git~1/config", b"GIT~2", b".git /x", b".git./x", b".git...", b".git::$INDEX_ALLOCATION/x", ".g\u200cit/config".encode(),
    ".gi\ufefft".encode(), "\uff0egit/x".encode(), b"a\\..\\..\\x", b"a\\.git\\config", b"\\lead", b"trail\\", b"\x1b]52;c;x\x07", "a\u202eb".encode(), b"a\xffb",
    b"x" * 256, b"/".join([b"d"] * 65), b"/".join([b"y" * 100] * 11), b"a\rb", b".Git\\hooks\\x"]


@each("path", EVIL)
@promise(3)
def test_evil_paths_are_refused(lab, path):
    for mode in (b"100644", b"120000"):
        lab.refuse(one(path, mode))
    lab.refuse(export(commit(1, b"D " + path)))
    lab.refuse(files(b"M 100644 :1 " + path), "files")
    lab.refuse(files(b"D " + path, contents=[]), "files")


@each("path", ODD)
def test_odd_paths_are_left_out_and_named(lab, path):
    for at, (how, stream) in enumerate((("git", export(blob(1, b"x"), commit(2, b"M 100644 :1 " + path, b"M 120000 :1 good"))),
            ("git", export(blob(1, b"x"), commit(2, b"M 100644 :1 good"), commit(3, b"D " + path, parent=b"from :2"))),
            ("files", files(b"M 100644 :1 " + path, b"M 100644 :1 good")))):
        assert set(lab.take(stream, how)) == {"good"}
        named = [note for note in lab.told["notes"] if note.startswith("left out: ")]
        assert len(named) == (at != 1) and all(note.isprintable() for note in named)
        assert not named or path.decode(errors="replace")[:40] in named[0] or not re.match(rb"[ !#-\[\]-~]+\Z", path)


@each("target", [b"/etc/passwd", b"../x", b"a/../../x", b".git/config", b"x/.GIT", b"", b"a\0b", b"..", b"x/..", b"\\etc", b"a" * 1025])
@promise(3)
def test_evil_links_are_refused(lab, target):
    if target != b"\\etc":
        lab.refuse(one(b"l", b"120000", target))
        lab.refuse(files(b"M 120000 :1 l", contents=[target]), "files")


def test_one_blob_under_many_names_counts_as_often(new_lab):
    lab, large = new_lab(PULL_TOTAL_MAX=1 << 20, PULL_FILE_MAX=200_000), blob(1, bytes(100_000))
    lab.refuse(one(b"x", data=bytes(200_001)), what="more than")

    def names(*numbers, folder=b"", line=b"M 100644 :1 %s%d"):
        return [line % (folder, n) for n in range(*numbers)]
    for commits in ([commit(2, *names(12))], [commit(2, *names(6)), commit(3, *names(6, 12), parent=b"from :2")],
            # what one commit took away is there in another that does not stand on it
            [commit(2, *names(9)), commit(3, *names(9, line=b"D %s%d"), parent=b"from :2"), commit(4, *names(9, 12), parent=b"from :2")]):
        lab.refuse(export(large, *commits), what="it repeats files")
    assert len(lab.take(export(large, commit(2, *names(10))))) == 10
    # a directory that is renamed again and again is as large as before
    moves = [commit(at, *names(9, folder=b"d%d/" % at), *names(9, folder=b"d%d/" % (at - 1), line=b"D %s%d"), parent=b"from :%d" % (at - 1))
        for at in range(3, 10)]
    assert set(lab.take(export(large, commit(2, *names(9, folder=b"d2/")), *moves))) == {f"d9/{n}" for n in range(9)}


def test_names_that_fold_in_the_base_may_stay(new_lab):
    lab = new_lab()
    lab.save({"Dir/a": b"x", "dir/b": b"x"})
    for data, line in ((b"x", b"M 100644 :1 dir/B"), (b"x", b"M 100644 :1 DIR/evil"), (b"src", b"M 120000 :1 DIR")):  # the last two: a third spelling
        lab.refuse(export(blob(1, data), commit(2, line)), what="one file where case")
    assert set(lab.take(export(blob(1, b"x"), commit(2, b"M 100644 :1 dir/new", b"M 100644 :1 Dir/other")))) == {"dir/new", "Dir/other"}


@each("stream", [
    *(one(name, b"120000", b"README") for name in (b".gitmodules", b".gitattributes", b".GITMODULES", b"gitmod~1")),
    one(b".gitmodules", data=b'[submodule "../../x"]\n\tpath = a\n\turl = b\n'), one(b".gitmodules", data=b'[submodule "a"]\n\tpath = a\n\turl = -ufoo\n'),
    export(blob(1, b""), commit(2, b"M 160000 :1 sub")), one(b"x", b"100666"), one(b"x", b"040000"),
    *map(one, (b"readme", b"SRC/b.c", b"Src", b"README/x", b"src", b"src/a.c/x")),
    *(export(blob(1, b"x"), commit(2, *lines)) for lines in (
        ("M 100644 :1 é".encode(), "M 100644 :1 e\u0301".encode()), (b"M 100644 :1 l/x", b"M 100644 :1 L/y"), (b"M 100644 :1 a", b"M 100644 :1 a"), (b"M 100644 :3 a",))),
    export(blob(1, b"src"), blob(2, b"x"), commit(3, b"M 120000 :1 l", b"M 100644 :2 l/x")),
    *(export(commit(1, line)) for line in (
        b"M 160000 %s sub" % (b"1" * 40), b"M 100644 :1 a", b"R README x", b"deleteall")),
    *(export(commit(1, parent=parent)) for parent in (b"from " + b"c" * 40, b"from :1", b"from main", b"merge :2", b"", b" ".join([b"from :0"] * 17))),
    export(commit(1), commit(1)), export(commit(1, parent=b"from :2"), commit(2)),
    [commit(1, parent=BASE)[0].replace(b"1 commit", HOSTS_BASE + b" commit"), b"", b""],
    export(*(blob(n, b"[a]b=%d\n" % n) for n in range(1, 102)), commit(999, *(b"M 100644 :%d d%d/.gitmodules" % (n, n) for n in range(1, 102)))),  # 2 processes each
    export(blob(2, b"x")), export(blob(1, b"x"), blob(1, b"y"), commit(2, b"M 100644 :1 a")), export(blob(1, b"x"), blob(2, b"y"), commit(2, b"M 100644 :1 a")),
    *([b"".join(part) for part in zip(commit(2, b"M 100644 :1 a"), (b"", b"", data))] for data in (
        b"1 blob -1\n", b"1 blob 99999999999999999999\n", b"1 blob 21474836480\n", b"1 blob 01\nx\n", b"1 blob 0x1\nx\n", b"1 blob\n", b"1 missing\n",
        b"1 tree 1\nx\n", b"1 tag 1\nx\n", b"1 commit 1\nx\n", b"1 blob 1\nxx", b"1 blob 2\nx\n", b"1 blob 1\nx\n\nmore", b"", b"\n", b"\0", b"1 blob 1\nx\r\n")),
    *([data, b"", b""] for data in (
        b"tag x\n", b"option git quiet\n", b"checkpoint\n", b"aa commit -1\n",
        b"aa commit 99999999999999999999\n", b"aa tree 1\nx\n", b"aa blob 1\nx\n", b"aa tag 3\nabc\n", b"aa commit 0\n\n", b"AA commit 0\n\n", b"x" * 65 + b" commit 0\n\n", b"x" * 100000, b"more", b"\0")),
    *([commit(2)[0], data, b""] for data in (
        b"3\0", b"2\0" * 2, row(b"D README"), b"2\0:100644 100644 0 1 M\0README\0" * 2, b"2\0:100644 100644 0 1 D\0README\0", b"2\0:100644 000000 0 0 M\0README\0", b"2\0:100644 000000 0 0 D\0nothing\0",
        b"2\0:100644 100644 0 g M\0README\0", b"2\0:100644 100644 0 %s M\0README\0" % (b"1" * 65), b"2\0:100644 100644 0 1 R100\0README\0x\0", b"2\0:100644 100644 0 1 U\0README\0", b"2\0:100644 1006440 0 1 M\0a\0",
        b"2\0::100644 100644 100644 1 1 1 MM\0README\0", b"2\0" + b"x" * 10000, b"2\0:100644 000000 0 0 D\0" + b"x" * 10000, b"2\n:100644 000000 0 0 D\nREADME\n", b"2\0\0more")),
    [b""], [b"done\n"], [b"\n\0"], [b"aa"], [commit(2)[0] + b"\n2\0"],
    *(export(commit(1, who=who)) for who in (b"A <a@b> 99999999999999 +0000", b"A <a@b> 1 +9999", b"no mail", b"A <a@b>\ncommitter B <b@b> 1 +0000")),
    export(commit(1, message=b"x" * 300000)), export(blob(1, b"x"), commit(2, b"M 100644 :1 README/y", more=b"encoding rot13\n")),
], ids=lambda s: repr(b" ".join(s)[:70])[2:-1])
@promise(3)
def test_lying_exports_are_refused(lab, stream):
    lab.refuse(stream)


def test_names_that_collide_in_time_are_refused(lab):
    parts = [blob(1, b"x"), commit(2, b"M 100644 :1 new/a"), commit(3, b"M 100644 :1 other", parent=b"from :2")]
    lab.refuse(export(*parts, commit(4, b"M 100644 :1 NEW/b", parent=b"from :3")))
    assert set(lab.take(export(*parts, commit(4, b"D new/a", b"M 100644 :1 NEW/b", parent=b"from :3")))) == {"NEW/b", "other"}  # one after the other is no collision


@promise(3)
def test_hostile_names_and_messages_become_harmless(lab):
    lab.take(export(commit(1, who="\x1b[31mEve <> 5 +0000".encode().replace(b"<>", b"<e\x1bve>"), message=b"\x1b]52;c;x\x07 \0 \xff\n",
        more="encoding latin\u00fc\n".encode())))
    raw = lab.git("cat-file commit cmux/x")
    assert "\x1b" not in raw and "\0" not in raw
    lab.git("fsck --strict")


def test_a_host_without_git_that_lies_is_refused(lab):
    for lie in (files(b"M 100644 :2 a"), files(b"M 160000 :1 a"), files(b"M 040000 :1 a"), files(b"M 100644 :1 a", b"M 100644 :1 a"), files(b"D nothing", contents=[]),
            files(b"2", b"M 100644 :1 a"), files(b"1", b"M 100644 :1 a"), files(b"M 100644 :1 a", contents=[b"x", b"y"]), files(b"M 100644 :1 README/x"), files(b"M 100644 :1 readme"),
            files(b"M 120000 :1 l", b"M 100644 :2 l/x", contents=[b"src", b"x"]), files(b"M 120000 :1 .gitmodules", contents=[b"README"])):
        lab.refuse(lie, "files")


def test_a_stream_cut_anywhere_is_refused(lab):
    rng = os.urandom(40000)
    commits, changes, contents = export(blob(1, rng), blob(2, b"x"), commit(3, b"M 100644 :1 big", b"D src/a.c"), commit(4, b"M 100644 :2 y", parent=b"from :3"))
    for how, head, whole in (("git", [], commits + b"\n" + changes + b"\0" + contents),
            ("files", [b""], b"".join(files(b"M 100644 :1 big", b"M 100644 :2 y", contents=[rng, b"x"])))):
        for cut in [*range(0, len(whole) - 300, 4096), *range(len(whole) - 300, len(whole), 7)]:
            lab.refuse([*head, whole[:cut]], how)


def endless(kind):
    thousand = export(*(blob(i, b"%d" % i) for i in range(1000)), commit(5000, *(b"M 100644 :%d f%d" % (i, i) for i in range(1000))))
    first = [commit(2)[0], b"2\0"]
    rows = (b"".join(row(b"M 100644 :1 %s/%d" % (b"p" * 80, n * 1000 + i)) for i in range(1000)) for n in itertools.count())
    return {
        "blobs": [*thousand[:2], itertools.chain([thousand[2]], (b"".join(blob(n * 1000 + i, b"%d" % i)[2] for i in range(1000)) for n in itertools.count(9)))],
        "zeros": [first[0], first[1] + row(b"M 100644 :1 a"), itertools.chain([b"1 blob 83886080\n"], itertools.repeat(b"\0" * 131072))],
        "paths": [first[0], itertools.chain(first[1:], rows)],
        "long": [first[0], itertools.chain(first[1:], (row(b"M 100644 :1 %s%d" % (b"p" * 8000, n)) for n in itertools.count()))],
        "deep": export(blob(1, b"x"), commit(2, *(b"M 100644 :1 %d/%sx" % (n, b"a/" * 60) for n in range(3600)))),
        "commits": [(b"".join(commit(k, parent=b"from :%d" % (k - 1 if k > 1 else 0), message=b"m" * 16000)[0] for k in range(n * 100 - 99, n * 100 + 1)) for n in itertools.count(1))],
        "merges": [commit(2, parent=b" ".join([b"from :0"] * 5000))[0], b"", b""],
        "line": [itertools.repeat(b"x" * 131072)], "blank": [itertools.repeat(b"\n" * 131072)],
        "list": [b"", itertools.chain([b"1\0"], rows)], "tar": [b"", itertools.repeat(b"\0" * 131072)]}[kind]


@each("kind", ["blobs", "zeros", "paths", "long", "deep", "commits", "merges", "line", "blank", "list", "tar"])
def test_endless_streams_end_in_flat_memory(new_lab, kind):
    lab = new_lab(PULL_TOTAL_MAX=100 << 20, PULL_FILE_MAX=80 << 20)
    lab.take(one(b"x"))
    before = peak(lab.puller.pid)
    lab.refuse(endless(kind), "files" if kind in ("tar", "list") else "git")
    assert peak(lab.puller.pid) - before < 64


@compat
def test_a_hundred_thousand_files_in_flat_memory(new_lab):
    lab, n = new_lab(), 99999
    lab.take(one(b"x"))
    before = peak(lab.puller.pid)
    assert len(lab.take(export(*(blob(i + 1, b"%d" % i) for i in range(n)),
        commit(n + 1, *[b"M 100644 :%d dir%d/some/file-%d.txt" % (i + 1, i % 100, i) for i in range(n)])))) == n
    assert peak(lab.puller.pid) < max(64, before + 40), "to compile the file takes 46 MB, most of which nothing uses again (Python 3.13: 82 in all)"


def test_leaks_are_seen_across_chunks(new_lab):
    lab, data = new_lab(), {cut: b"x%03d" % cut + b"x" * 96 + b"s3cr3t-value" + b"y" * 100 for cut in range(90, 125)}
    for name, value in (("TOKEN", b"s3cr3t-value"), ("SHORT", b"x")):
        lab.secret(name, value)
    commits, changes, contents = export(*itertools.starmap(blob, data.items()), commit(999, *(b"M 100644 :%d f%d" % (cut, cut) for cut in data)))
    ends = [0, *(contents.index(text) + cut for cut, text in data.items()), len(contents)]
    lab.take([commits, changes, (sleep(0.05) or contents[at:end] for at, end in zip(ends, ends[1:]))])
    assert lab.told["secrets"] == {f"f{cut}": ["TOKEN"] for cut in data}


def do(repo, script, name="main"):
    repo.ok(f"exec -w {name} --", script)


def nothing_new(repo, *words):
    pulled = repo.ok("pull", *words)
    assert "Nothing new" in pulled.text
    return pulled


def untouched(repo):
    keep = ("objects", "refs/heads/cmux", "logs/refs/heads/cmux")
    return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else b"" for p in sorted(repo.dir.rglob("*"))
        if not str(p.relative_to(repo.dir)).startswith(tuple(".git/" + k for k in keep))}


AGENT = "export GIT_AUTHOR_NAME=Agent GIT_COMMITTER_NAME=Agent GIT_AUTHOR_EMAIL=a@host GIT_COMMITTER_EMAIL=a@host; "


CHANGES = r"""
printf 'more\n' >>plain.txt; git commit -qam 'one: é'
rm 'with space.txt'; git mv sub/dir/deep.txt sub/renamed.txt; chmod +x empty; chmod -x run.sh; git add -A; git commit -qm two
head -c 3000 /dev/urandom >binary.bin; printf x >'new
line 2 "q" é'; ln -s plain.txt newlink; ln -sf 'with space.txt' link; mkdir -p 'a b/c'; printf 'x' >'a b/c/-d'; printf y >'new
line'; rm -rf xxx*; rm 'back\slash'; mkdir 'back\slash'; echo z >'back\slash/z'
"""


def test_pull_brings_every_honest_change_home(odd):
    ran = odd.exec("git status --porcelain --ignored; git log --format=%s | wc -l; ./run.sh")
    assert (ran.code, ran.out.split()) == (0, [b"1", b"ran"])
    odd.arrived()
    assert odd.cli("diff").out == b""
    nothing_new(odd)
    assert not odd.git("for-each-ref refs/heads/cmux")
    do(odd, AGENT + CHANGES)
    before = untouched(odd)
    assert "newlink" in odd.ok("diff --stat").text
    assert not odd.git("for-each-ref refs/heads/cmux")
    odd.ok("pull")
    assert untouched(odd) == before
    there = tree_of(odd.path())
    assert odd.git("log", "--format=%an %s", "main..cmux/main").split("\n") == ["cmux uncommitted work", "Agent two", "Agent one: é"]
    odd.git("fsck --strict")
    odd.git("worktree add -q --detach ../wt main")
    odd.git("checkout -q -f cmux/main")
    assert odd.tree() == there
    odd.git("checkout -q main")
    nothing_new(odd)
    first = odd.id("cmux/main")
    do(odd, AGENT + "git add -A; git commit -qm three; echo later >later")
    odd.ok("pull")
    assert odd.git(f"merge-base {first} cmux/main") == first
    assert odd.pulled("later") == "later"
    nothing_new(odd)
    odd.ok("rm main")


@each("harm", [
    "rm -rf .git", "rm -rf .git; git init -q; git add -A; git commit -qm other", "rm -rf .git; echo x >.git",
    "git update-ref -d refs/cmux/base", "git checkout -q --orphan fresh; git add -A; git commit -qm orphan", "rm .git/index",
    "git init -q nested; git init -q n2; git -C n2 commit -q --allow-empty -m x; git add n2; git commit -qm gitlink",
    "git init -q nested; git -C nested commit -q --allow-empty -m x; git add -A",
    "i=0; while [ $i -lt 1010 ]; do printf 'commit refs/heads/main\ncommitter A <a@b> 9 +0000\ndata 1\nx\n'; [ $i != 0 ] || "
    "echo from $(git rev-parse main); i=$((i+1)); done | git fast-import --quiet",
    "git config core.fsmonitor 'touch /tmp/never'; git config filter.x.clean false; echo '* filter=x' >.git/info/attributes; git config core.autocrlf true",
])
def test_pull_survives_what_agents_do_to_git(repo, harm):
    repo.new()
    do(repo, AGENT + "echo changed >README; rm src/main.c; echo n >new; echo '*.o' >.gitignore; echo o >x.o; " + harm)
    pulled = repo.ok("pull")
    assert repo.changed("--name-status").split("\n") == ["A\t.gitignore", "M\tREADME", "A\tnew", "D\tsrc/main.c"]
    assert not os.path.exists("/tmp/never")
    if "nested" in harm:
        assert "nested repository ./nested" in pulled.said
    nothing_new(repo)


def nobody(site, path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to log in as somebody else")
    (site.dir / "nobody").mkdir()
    os.chown(site.dir / "nobody", 65534, 65534)
    for folder in (site.dir, *site.dir.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o001)
    site.daemon("nobody", site.first("", f'{program("setpriv", "util-linux")} --reuid 65534 --regid 65534 --clear-groups env PATH={path} HOME={site.dir}/nobody'))


def bare_host(site, busybox=False):
    folder = site.dir / "posix-bin"
    return site.inetd("nogit", env={"PATH": str(folder) if folder.is_dir() else posix_tools(folder, busybox=busybox)})


@each("busybox", [False, True])
def test_pull_without_git_on_the_host(site, busybox):
    odd = Repo(site, odd=True)
    odd.new(host=bare_host(site, busybox))
    assert not (odd.path() / ".git").exists()
    nothing_new(odd)
    do(odd, CHANGES.replace("git mv", "mv").replace("git", ": git"))
    there = tree_of(odd.path())
    odd.ok("pull")
    odd.git("checkout -q -f cmux/main")
    assert odd.tree() == there
    odd.git("fsck --strict")
    odd.git("checkout -q -f main")
    nothing_new(odd)
    odd.ok("rm main")


@each("how", ["shorter", "gone", "longer"])
def test_a_file_may_change_while_it_is_read(site, how, repo):
    host, head = bare_host(site), site.dir / "posix-bin" / "head"
    real, once = head.resolve(), site.dir / "once"
    head.unlink()
    script(head, f"""case "$*" in *./log) [ -e {once} ] || {{ : >{once}; case {how} in shorter) echo x >"$3";; gone) rm "$3";; *) echo more >>"$3";; esac; }};; esac
exec {real} "$@\"""")
    repo.new(host=host)
    do(repo, "echo first >log; echo x >more; echo '12 blob 2' >z")
    pulled = repo.cli("pull")
    if how == "longer":
        assert pulled.code == 0 and repo.pulled("log") == "first"
    else:
        refused(pulled, 1, "Nothing was imported. Try again.")
    assert repo.cli("rm main").code == 1
    repo.ok("pull")
    assert "z" in repo.git("ls-tree --name-only cmux/main") and repo.cli("rm main").code == 0


def test_what_cannot_be_read_is_no_deletion(site):
    repo = Repo(site, files={"own": b"o\n"})
    bare_host(site)
    nobody(site, str(site.dir / "posix-bin"))
    repo.new(host="nobody")
    do(repo, "echo x >new; chmod 0 own new; echo y >more")
    pulled = repo.ok("pull")
    assert all(f"./{name}: it cannot be read" in pulled.said for name in ("own", "new"))
    assert repo.changed() == "more"
    refused(repo.cli("rm main"), 1, "./new: it cannot be read")
    do(repo, "chmod 644 own new")
    repo.ok("pull")
    assert repo.pulled("new") == "x" and repo.cli("rm main").code == 0


def test_what_export_ignore_names_travels(place, repo):
    repo.save({".gitattributes": b"docs/ export-ignore\n*/deep/ export-ignore export-subst\n",
        **dict.fromkeys(("docs/a", "docs/b/c", "src/deep/x"), b"mine $Format:%H$\n")})
    assert repo.cli(f"new -H {place} main").said == "" and tree_of(repo.path()) == repo.tree()
    assert repo.cli("diff").text == ""
    repo.write("docs/dirty", b"d\n")
    repo.ok("push --dirty")
    assert repo.far("docs/dirty") == b"d\n"
    repo.save("docs/b/c", os.urandom(9) + b"\r\n")
    repo.ok("push")
    assert tree_of(repo.path()) == repo.tree() and repo.cli("diff").text == ""
    do(repo, "echo its >docs/a; rm -r src/deep; echo new >docs/new")
    assert repo.cli("rm main").code == 1
    repo.ok("pull")
    assert repo.changed("--name-status").split() == ["M", "docs/a", "A", "docs/new", "D", "src/deep/x"]
    do(repo, "rm -r docs")
    repo.ok("pull")
    assert "docs" not in repo.git("ls-tree -r cmux/main")
    repo.ok("rm main")


def older(repo, names):
    """Make of the workspaces of a commit what a version left there that sent no export-ignored file of the next commit."""
    before = repo.id("HEAD^{tree}")
    repo.write("docs/a", b"mine\n")
    entry = {"base": repo.commit(), "tree": repo.id("HEAD^{tree}")}
    with repo.amended() as record:
        for name in names:
            del record["workspaces"][name]["host_tree"]
            record["workspaces"][name].update(entry)
    own = repo.path(names[0]).parents[1] / ".cmux"
    (own / "bases" / before).rename(own / "bases" / entry["tree"])
    (own / "bases" / entry["tree"] / "whole.tar").rename(own / "bases" / entry["tree"] / "tree.tar")
    for path in own.glob("made/*/*.op"):
        known = path.parent / path.read_text().strip()
        for part in known.iterdir():
            part.rename(path.with_suffix("." + part.name))
        known.rmdir()
    for path in own.glob("made/*/*.base"):
        path.write_text(entry["tree"] + "\n")


def test_an_older_workspace_loses_nothing(site, place):
    repo = Repo(site, files={".gitattributes": b"docs/ export-ignore\n"})
    names = ["clean", "pushed", "work"]
    repo.new(*names, host=place)
    older(repo, names)
    for name in names:
        for verb in ("pull", "diff"):
            refused(repo.cli(verb, "-w", name), 1, "older version")
    repo.new("fresh", host=place)
    repo.arrived("fresh")
    do(repo, "mkdir docs; echo its >docs/a", "work")
    for words in ("rm work", "push -w work"):
        told = repo.cli(words)
        assert told.code == 1 and ("docs/a" in told.said or place != "box") and repo.far("docs/a", "work") == b"its\n"
    force = "--force " * (place != "box")  # only its base says what was sent
    repo.ok(f"rm {force}clean")
    repo.ok(f"push {force}-w pushed")
    repo.arrived("pushed")
    assert "already" in repo.cli("push -w pushed").text
    assert "is kept until gc" in repo.ok("push --force -w work").said and tree_of(repo.path("work")) == repo.tree()
    for name in ("pushed", "work"):
        do(repo, "echo its >>docs/a", name)
        repo.ok(f"pull -w {name}")
        assert repo.git("diff --name-only main", "cmux/" + name) == "docs/a"


@each("how", ["git checkout -q --orphan fresh; echo x >x; git add -A; git commit -qm orphan",
    "git checkout -qb feature; echo x >x; git add -A; git commit -q --amend -m amended",
    "git init -q ../up; git -C ../up -c user.name=a -c user.email=a@x commit -q --allow-empty -m theirs; git fetch -q ../up HEAD:refs/remotes/origin/main; echo x >x"],)
def test_what_is_no_work_holds_up_no_rm(repo, how):
    repo.new()
    do(repo, how)
    pulled = repo.ok("pull")
    assert repo.pulled("x") == "x" and "the branch main" not in pulled.said
    repo.ok("rm main")


def test_a_gitmodules_comes_only_where_it_is_allowed(repo):
    repo.new()
    do(repo, "mkdir modules; echo '*.o' >modules/.gitignore")  # not read as one
    repo.ok("pull")
    url = '[submodule "a"]\n\tpath = a\n\turl = '
    for text in ("<<<<<<< HEAD\n" + url, url + "a" * 60_000_000,
            *(url + runs + "\n" for runs in ("\\\next::sh -c id", '""ext::sh -c id', 'e"x"t::sh -c id', '"!touch x"', "-u"))):
        (repo.path() / ".gitmodules").write_text(text)
        refused(repo.cli("pull"), 1, "git takes URLs and commands from it")
    refused(repo.cli("pull --allow"), 1, "git refuses the result")
    (repo.path() / ".gitmodules").write_text(url + "../a\n")
    repo.ok("pull --allow")


RACY = """
import os, subprocess, time
time.sleep(1 - time.time() % 1 + .02)
with open("README", "r+") as stream:
    stream.write("2222\\n")
subprocess.check_call(["git", "commit", "-qam", "two"])
with open("README", "r+") as stream:
    stream.write("3333\\n")
"""


@promise(7)
def test_a_file_changed_in_the_second_of_its_commit_is_seen(repo):
    """Its size and its second are those of the index: git reads it again if the index keeps its own time, also as a copy."""
    repo.save("README", b"1111\n")
    repo.new()
    for place in (repo.path(), repo.dir):
        subprocess.run([sys.executable, "-c", RACY], cwd=place, env=repo.site.environment(), check=True)
    sleep(1.2)
    repo.ok("pull")
    assert repo.pulled("README") == "3333"
    repo.new("--dirty", "other")
    assert repo.far("README", "other") == b"3333\n"


@each("first", ["git commit -q --amend --allow-empty -m amended", "git init -q nested; git -C nested -c user.name=a -c user.email=a@b commit -q --allow-empty -m n; git add nested; git commit -qm link"])
@promise(7)
def test_branches_and_stashes_are_told_without_history(repo, first):
    repo.new()
    do(repo, "git checkout -qb side; echo s >side; git add .; git commit -qm side; git checkout -q main; echo st >>README; git stash -q; echo x >x; git add .; " + first)
    pulled = repo.ok("pull")
    assert repo.pulled("x") == "x"
    for words in ("left out: the branch side", "left out: the ref stash (WIP", "left out: how its commits follow one another"):
        assert words in pulled.said
    refused(repo.cli("rm main"), 1, "branch side", "ref stash (WIP")
    do(repo, "git branch -q -D side; git stash drop -q; rm -rf nested; git reflog expire --expire=now --all")
    repo.ok("pull")
    repo.ok("rm main")


def test_pull_and_push_with_sha256_repositories(repo, site):
    host = site.inetd("git3", env=replaced(site, git="""
case "$1,$GIT_DEFAULT_HASH,$*" in init,,*--object-format*) ;; init,,*) shift; set -- init --object-format=sha256 "$@";; esac"""))
    repo.new(host=host)
    for turn in range(2):
        do(repo, AGENT + f"echo {turn} >work; git add work; git commit -qm 'turn {turn}'; echo {turn} >more")
        repo.ok("pull")
        assert repo.git("log -2 --format=%s cmux/main") == f"uncommitted work\nturn {turn}"
        repo.git("merge -q cmux/main")
        repo.ok("push")
    repo.ok("rm main")


def test_pulls_in_a_shallow_clone_follow_one_another(repo):
    repo.save("README", b"two\n")
    (repo.dir / ".git/shallow").write_text(repo.id("HEAD"))
    repo.git("reflog expire --expire=now --all")
    repo.git("gc -q --prune=now")
    repo.new()
    for how in ("echo x >new", "git add -A; git commit -qm made"):
        do(repo, how)
        assert repo.ok("pull").said.count("\n") == 1 and "Nothing new" in repo.ok("pull").text


def test_commits_with_odd_dates_and_encodings_come_home(repo):
    dates = {"@1 -1159": "1970-01-01T00:00:00-11:59", "@0 +0000": "1970-01-01T00:00:00Z", "@99 +1400": "1970-01-01T14:01:39+14:00", "@99 +1401": "1970-01-01T00:01:39Z",
        "@1700000000 +1545": "2023-11-14T22:13:20Z"}
    repo.new()
    do(repo, "".join(f"echo '{date}' >x; git add x; GIT_AUTHOR_DATE='{date}' git commit -qm '{date}'; " for date in dates) +
       "echo z >x; git add x; printf 'gr\\374n' | GIT_AUTHOR_NAME=$(printf 'J\\366rg') git -c i18n.commitEncoding=ISO-8859-1 commit -qF -")
    repo.ok("pull")
    log = repo.git("log --reverse --format=%s=%aI=%an main..cmux/main").replace("+00:00", "Z").split("\n")
    assert [row.split("=")[:2] for row in log[:5]] == [list(row) for row in dates.items()]
    assert re.fullmatch("gr\ufffdn=.*=J\ufffdrg", log[5])


def test_a_lost_base_is_said(repo):
    repo.new()
    repo.write("README", b"amended\n")
    repo.git("commit -q -a --amend -m amended")
    repo.git("reflog expire --expire=now --all")
    repo.git("gc -q --prune=now")
    do(repo, "echo x >x")
    for verb in ("pull", "diff"):
        refused(repo.cli(verb), 1, "lacks a part of what main was made of")
    assert repo.cli("rm main").code == 1


@each("change, gone, there", [("mv v1 t; mv v2 v1; mv t v2", "", {"v1/x": "TWO", "v2/x": "ONE"}), ("rm -r v1; mv v2 v1", "v2/x", {"v1/x": "TWO"})])
def test_directories_that_changed_places(site, change, gone, there):
    repo = Repo(site, files={"v1/x": b"ONE\n", "v2/x": b"TWO\n"})
    repo.new(host=bare_host(site))
    do(repo, change)
    repo.ok("pull")
    assert {path: repo.git("show", f"cmux/main:{path}") for path in there} == there
    assert repo.git("diff --name-only --diff-filter=D main cmux/main") == gone
    repo.ok("rm main")


@each("harm", ["echo u >untracked", "echo c >>README", "rm README; echo x >src/x"])
@promise(7)
@compat
def test_rm_refuses_changed_files(place, harm, repo):
    repo.new(host=place)
    do(repo, harm)
    assert repo.ok("diff").out
    kept = repo.cli("rm main")
    refused(kept, 1, harm.split()[-1].lstrip(">").replace("src/", ""))
    assert "--force" in kept.said
    repo.ok("pull")
    if place == "box":
        do(repo, "echo again >again; echo o >two")
        assert repo.cli("rm main").code == 1
        repo.ok("pull")
    repo.ok("rm main")


@each("harm", ["echo u >new; touch -t 200101010000 new", "cp -p README copy", "mv README renamed", "rm README", "chmod +x README",
    "ln -sf elsewhere link", "touch -r README r; echo z >>README; touch -r r README; rm r"])
def test_rm_and_push_see_what_no_time_tells(site, harm):
    repo = Repo(site, files={"README": b"read\n", "src/x": b"x\n"})
    repo.save("src/x", b"y\n")
    repo.new("main", "other", host=bare_host(site))
    do(repo, harm)
    for words in ("rm main", "push --ref HEAD~1"):
        refused(repo.cli(words), 1, "changed ./")
    repo.ok("fork twin")
    assert repo.cli("rm twin").code == 1 and repo.cli("rm other").code == 0
    repo.ok("pull")
    repo.ok("rm main")


@each("harm", [
    "git checkout -q --detach; {}; git checkout -q main", "{}; git reset -q --hard HEAD~1", "{}; git commit -q --amend -m other",
    "git worktree add -q --detach ~/wt; cd ~/wt; {}", "git checkout -q --detach; {}; git checkout -q --orphan fresh",
    "git checkout -q -b side; {}; git checkout -q main", "{}; git update-ref refs/odd/one HEAD; git reset -q --hard HEAD~1",
])
def test_pull_names_what_it_does_not_bring(repo, harm):
    repo.new()
    do(repo, AGENT + harm.format("echo x >>README && git commit -qam lonely"))
    before = repo.cli("rm main")
    refused(before, 1, "lonely")
    pulled = repo.cli("pull")
    left = re.search(r"left out: the (\w+ \S+ \(lonely\)): check it out", pulled.said)
    assert pulled.code == 0 and left and left.group(1) in before.said
    refused(repo.cli("rm main"), 1, left.group(1))
    do(repo, f"git checkout -q -f --detach {left.group(1).split()[1]}")
    repo.ok("pull --branch found")
    assert repo.git("log --format=%s found").startswith("lonely")
    do(repo, "git checkout -q -f main || git checkout -q -f -b main refs/cmux/base")
    assert "check it out" not in repo.ok("pull --branch third").said
    repo.ok("rm main")


@each("harm, told", [
    ("echo x >>README; git stash -q", ["stash"]), ("echo x >>README; git commit -qam lonely", ["lonely"]),
    ("echo W >w; git add w; git commit -qm sent; git update-ref refs/remotes/foo/bar HEAD; git reset -q --hard HEAD~1", ["sent"]),
    ("echo precious >p; git add p; git commit -qm r; git tag t; git checkout -q --orphan fresh; git rm -q --cached p; rm p", ["branch main", "tag t"]),
    ("git checkout -qb side; git commit -q --allow-empty -m s; git checkout -q main; printf %040d 7 >.git/refs/heads/bad", ["side (s)", "bad (damaged)"])])
@promise(7)
@compat
def test_rm_refuses_commits_and_stashes(repo, harm, told):
    repo.new()
    do(repo, AGENT + harm)
    if "orphan" in harm:
        assert "the branch main" in repo.cli("pull").said
    answer = repo.cli("rm main")
    refused(answer, 1, told[0])
    assert told[-1] in answer.said and repo.path().exists()
    repo.ok("rm --force main")


@each("fails, harm, told", [("diff-index", "echo x >README", "some file"), ("log -n", "git commit -q --allow-empty -m x", "look for changes"),
    ("for-each-ref", ":", "look for changes")])
def test_rm_refuses_where_git_there_fails(repo, fails, harm, told, site):
    repo.new(host=site.inetd("poor", env=replaced(site, git=f'case " $* " in *" {fails} "*) exit 1;; esac')))
    do(repo, AGENT + harm)
    refused(repo.cli("rm main"), 1, told)


def test_pull_refuses_what_is_not_its_own(repo):
    repo.new()
    do(repo, "echo x >x")
    for branch in ("-x", "../x", "HEAD", "main", "a..b", "x y", "x.lock"):
        refused(repo.cli("pull", "--branch=" + branch), 1 if branch == "main" else 2, f"'{branch}' is ")
    theirs = repo.git("commit-tree HEAD^{tree} -p HEAD -m", "somebody's own")
    repo.git("branch cmux/main", theirs)
    assert repo.cli("pull").code == 1 and repo.id("cmux/main") == theirs
    repo.ok("pull --branch other")
    assert repo.git("show other:x") == "x"
    do(repo, "truncate -s 300000000 big")
    refused(repo.cli("pull --branch third"), 1, "big")
    do(repo, "rm big; truncate -s 20G sparse")
    sparse = repo.cli("pull --branch third")
    refused(sparse, 1, "sparse")
    assert sparse.seconds < 10
    do(repo, "rm sparse; ln -s /etc/passwd l")
    refused(repo.cli("pull --branch third"), 1, "/etc/passwd")
    assert repo.git("for-each-ref --format=%(refname)") == "refs/heads/cmux/main\nrefs/heads/main\nrefs/heads/other"


@promise(3)
def test_pull_says_what_would_run_and_what_leaks(repo):
    repo.secret("TOKEN", b"s3cr3t-s3cr3t")
    repo.new()
    repo.git("config core.hooksPath .husky")
    do(repo, "echo $TOKEN >'a\ncmux_ssh.py: all is well.'")
    do(repo, 'echo "$TOKEN" >.env; echo all: >Makefile; mkdir -p .github/workflows; echo x >.github/workflows/x.yml; echo x >run.sh; chmod +x run.sh; ln -s README l')
    pulled = repo.ok("pull")
    assert ".env holds the secret TOKEN" in pulled.said and "s3cr3t" not in pulled.said + pulled.text
    assert "all is well. holds the secret TOKEN" in pulled.said and not re.search("^cmux_ssh.py: all is well", pulled.said, re.M)
    for name in ("Makefile (file", ".github/workflows/x.yml (file", "run.sh (executable)", "l (symbolic link)"):
        assert name in pulled.text
    do(repo, "mkdir .husky; echo x >.husky/post-checkout")
    assert repo.cli("pull").code == 1
    assert b"git diff ...cmux/main, or git merge cmux/main" in repo.terminal("pull --allow").talk().output


def test_hooks_are_found_in_any_configuration(repo):
    repo.write("tools/hooks/x", b"1")
    (repo.dir / "myhooks").symlink_to("tools/hooks")
    repo.commit()
    repo.new()
    env = {}
    if tuple(map(int, re.findall(r"\d+", repo.git("--version"))[:2])) >= (2, 31):  # older ones do not know these variables
        env = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": "tools/hooks"}
    for scope, hooks, harm in (
            ("--local", "myhooks", "mkdir src/h; echo x >src/h/post-checkout; rm myhooks; ln -s src/h myhooks"),
            ("--local", "tools/hooks", "rm -r tools; mkdir -p evil/hooks; ln -s evil tools; echo x >evil/hooks/post-checkout"),
            ("--local", ".", "echo x >post-checkout"), ("--local", "myhooks", "echo x >tools/hooks/post-checkout"),
            ("--global", "tools/hooks", "echo x >tools/hooks/y"), ("env", "", "echo x >tools/hooks/y")):
        do(repo, f"git checkout -q .; git clean -qfd; {harm}")
        if hooks:
            repo.git("config", scope, "core.hooksPath", hooks)
        if hooks or env:
            refused(repo.cli("pull", env={} if hooks else env), 1, "runs hooks from there")
        repo.git("config", scope, "--unset", "core.hooksPath") if hooks else None
    do(repo, "git checkout -q .; git clean -qfd; mkdir below; echo x >below/post-checkout")
    repo.git("config core.hooksPath .")
    repo.ok("pull")


@promise(4)
def test_pull_into_a_malicious_repository_runs_nothing(repo):
    trap = repo.dir.parent / "trap"
    evil = script(repo.dir.parent / "evil.sh", f"echo ran >>{trap}\ncat")
    for hook in ("reference-transaction", "post-index-change", "post-checkout", "pre-commit", "post-commit", "pre-auto-gc", "fsmonitor-watchman"):
        path = repo.dir / ".git" / "hooks" / hook
        path.parent.mkdir(exist_ok=True)
        shutil.copy(evil, path)
    repo.save(".gitattributes", b"* filter=evil diff=evil\n")
    trap.unlink(missing_ok=True)
    for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "diff.evil.textconv", "diff.evil.command", "diff.external", "core.pager",
            "gpg.program", "core.sshCommand", "tar.tgz.command", "tar.tar.command", "core.editor", "credential.helper", "uploadpack.packObjectsHook"):
        repo.git("config", key, str(evil))
    repo.git("config commit.gpgSign true")
    repo.git("config protocol.ext.allow always")
    (repo.dir / ".git/info/attributes").write_text("* filter=evil\n")
    env = {"GIT_DIR": "/nonexistent", "GIT_INDEX_FILE": "/nonexistent", "GIT_WORK_TREE": "/", "GIT_OBJECT_DIRECTORY": "/nonexistent", "GIT_EXTERNAL_DIFF": str(evil), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": str(evil)}
    repo.new(env=env)
    repo.ok("exec -w main --", "grep -q hello README && echo x >>README", env=env)
    for words in ("diff -w main", "pull -w main", "rm main"):
        repo.ok(words, env=env)
    assert not trap.exists()


def test_filters_of_the_users_configuration_do_not_run(repo, site):
    """git before 2.32 reads ~/.gitconfig whatever GIT_CONFIG_GLOBAL is."""
    trap = site.dir / "trap"
    for verb in ("clean", "smudge"):
        repo.git(f"config --global filter.evil.{verb}", f"echo ran >>{trap}; cat")
    repo.save({".gitattributes": b"* filter=evil\n", "README": b"new\n"})
    trap.unlink(missing_ok=True)
    repo.new()
    do(repo, "echo more >>README")
    repo.ok("pull")
    assert not trap.exists() and repo.pulled("README") == "new\nmore"


def test_hooks_of_the_configuration_do_not_run(repo, site):
    """git 2.54 has them; in front of an older one (of 2.31 and later), a program does what it does."""
    trap, shim = site.dir / "trap", site.dir / "git-2.54.py"
    shim.write_text(f"""
import os, subprocess, sys
words, real, hooks = sys.argv[1:], {program("git")!r}, {{}}
told = subprocess.run([real, *words[:words.index("update-ref")], "config", "-z", "--get-regexp", "^hook[.]"], stdout=subprocess.PIPE).stdout
for row in told.decode().split("\\0")[:-1]:
    key, value = row.split("\\n")
    hooks.setdefault(key.rpartition(".")[0], {{}})[key.rpartition(".")[2]] = value
for hook in hooks.values():
    if hook.get("event") == "reference-transaction" and hook.get("enabled") != "false":
        subprocess.run(hook["command"], shell=True)
os.execv(real, [real, *words])
""")
    for scope, name in (("--local", "k"), ("--global", "a=b. c")):
        repo.git("config", scope, f"hook.{name}.event", "reference-transaction")
        repo.git("config", scope, f"hook.{name}.command", f"echo ran >>{trap}")
    env = replaced(site, git=f'case " $* " in *" update-ref "*) exec {sys.executable} -S {shim} "$@";; esac')
    repo.git("update-ref refs/heads/proof HEAD", env=env)
    assert trap.read_text().startswith("ran\nran\n")
    trap.unlink()
    for n, words in enumerate((["new", "-H", "box", "--dirty", "main"], ["exec", "--", "echo x >>README"], ["pull"], ["push", "--dirty"])):
        repo.write("dirty", b"%d" % n)
        repo.ok(*words, env=env)
        assert not trap.exists(), words


def test_a_line_cut_during_pull_leaves_nothing(line, repo):
    repo.new(host="far")
    do(repo, "head -c 400000 /dev/urandom >big")
    for limit in (20000, 100000, 300000):
        line.cut["down"] = limit
        assert repo.cli("pull").code == 255
        assert not repo.git("for-each-ref refs/heads/cmux")
    line.cut["down"] = None
    repo.ok("pull")


def test_what_may_not_come_has_a_way_out(repo):
    repo.cli("new -H box main")
    do(repo, AGENT + "echo one >one; git add .; git commit -qm one; ln -s ../../x evil; git add evil; git commit -qm a; git rm -q evil; git commit -qm b; echo u >u")
    answer = repo.cli("pull")
    refused(answer, 1, "pull again. If only an earlier commit has it, squash them: ")
    assert "cmux_ssh.py exec -- 'git reset --soft refs/cmux/base && git commit -m all'" in answer.said
    refused(repo.cli("rm main"), 1, "would be lost")
    do(repo, "git reset --soft refs/cmux/base && git commit -m all")
    repo.ok("pull")
    assert repo.pulled("one") == "one" and repo.pulled("u") == "u"
    refused(repo.cli("rm main"), 1, " (a)")  # only a reflog has it, and it cannot come
    repo.ok("rm --force main")


def test_names_that_cannot_come_are_left_out(site, place):
    own = ["\\lead", "trail\\", "a\\..\\b"]
    repo = Repo(site, files={name: b"old\n" for name in [*own, "README"]})
    repo.new(host=place)
    do(repo, "for f in * ; do echo new >\"$f\"; done; mkdir .GIT sub; for f in 'git~1' .GIT/x 'sub/\\new' \"$(printf 'c\\001')\" \"$(printf 'l\\351')\"; do echo odd >\"$f\"; done")
    odd = [".GIT/x", "c^A", "git~1", "l\ufffd", "sub/\\new"]
    refused(repo.cli("rm main"), 1, "would be lost")
    assert "4 files changed" in repo.ok("diff --stat").text
    pulled = repo.ok("pull")
    assert sorted(line.split()[3].rstrip(":") for line in pulled.said.splitlines() if "left out" in line) == odd
    assert set(repo.git("-c core.quotePath=false diff -z --name-only main cmux/main").split("\0")) == {*own, "README", ""} and repo.pulled("\\lead") == "new"
    refused(repo.cli("rm main"), 1, "sub/")
    do(repo, "rm -r sub 'git~1' .GIT c?; rm l*")
    repo.ok("pull")
    repo.ok("rm main")


@each("push", [False, True])
def test_a_history_that_cannot_come_loses_no_file(site, push):
    """Also where the base came as a delta, and has no repository of its own."""
    repo = Repo(site, files={**{f"f{n}": b"%d" % n for n in range(9)}, ".gitignore": b"dist/\n.env\n"})
    repo.new()
    if push:
        repo.save("f2", b"new")
        repo.ok("push")
    do(repo, AGENT + "mkdir dist; echo precious >dist/report; echo KEY >.env; echo no >dist/no; git add -f dist/report; git commit -qm r; git checkout -q --orphan other; git commit -qm o")
    repo.ok("pull")
    assert repo.git("diff --name-only HEAD cmux/main") == "dist/report" and repo.pulled("dist/report") == "precious"
    do(repo, "git checkout -q -b more; git rm -q --cached f1; git tag saved $(git commit-tree -m only-in-tag HEAD^{tree})")
    do(repo, "git checkout -q other")
    refused(repo.cli("rm main"), 1, "would be lost")
    assert "the tag saved (only-in-tag): check it out in the workspace and pull" in repo.cli("pull").said
    refused(repo.cli("rm main"), 1, "tag saved")
    do(repo, "git tag -d saved; git branch -D more main; git reflog expire --expire=now --all")
    repo.ok("pull")
    repo.ok("rm main")


def test_a_repository_no_pull_looks_into_is_told(site, repo):
    host = bare_host(site)
    repo.new(host=host)
    (site.dir / "posix-bin" / "git").symlink_to(program("git"))  # as if it was installed later
    do(repo, "git init -q && git config user.name a && git config user.email a@x && git add -A && git commit -qm base && "
        "git checkout -qb feature && echo W >work && git add work && git commit -qm work && git checkout -q -")
    refused(repo.cli("rm main"), 1, "a git repository in .")
    assert repo.ok("pull").said.count("the commits of the git repository in .") == 1
    next(site.remote.glob("**/whole.tar")).unlink()
    refused(repo.cli("pull"), 1, "is gone; cp takes its files")
    refused(repo.cli("rm main"), 1, "a git repository in .")
    repo.ok("rm --force main")


def test_pull_and_diff_go_by_the_base_of_now(repo):
    repo.new()
    repo.write("README", b"hello\nusers line\n")
    new = repo.commit()
    assert in_library(repo, """
project = Project(".")
workspace = project.workspace("main")
assert project.push("main")
workspace.exec("echo a >>README; git -c user.name=a -c user.email=a@x commit -qam w")
print([line for line in diff(workspace) if line.startswith(("+", "-"))][2:], pull(workspace).base)
""") == "['+a'] %s\n" % new


def test_a_branch_in_use_does_not_move(repo, line):
    repo.new(host="far")
    do(repo, "echo 1 >agents")
    repo.ok("pull")
    do(repo, "echo 2 >agents; head -c 1000000 /dev/urandom >large")
    before = repo.id("cmux/main")
    line.trap = ("down", 500_000, lambda: repo.git("checkout -q cmux/main"))
    refused(repo.cli("pull"), 1, "is checked out: a pull")
    assert line.trap is None and repo.id("cmux/main") == before and not repo.git("status --short")
    repo.git("checkout -q main")
    line.trap = ("down", 500_000, lambda: repo.git("branch -f cmux/main main"))
    refused(repo.cli("pull"), 1, "could not be set")
    assert repo.id("cmux/main") == repo.id("main")
    repo.ok("pull")
    assert repo.pulled("agents") == "2"


# === Submodules and LFS ===


LIB, INNER = 'vendor/li b "q\'', "in ner"


CONTENT = b"\0LFS content\n" * 300000


def content(result):
    assert ("content" in result) != ("content_base64" in result)
    return result["content"].encode() if "content" in result else base64.b64decode(result["content_base64"])


def lfs_object(content):
    name = digest(content)
    return f".git/lfs/objects/{name[:2]}/{name[2:4]}/{name}"


class Family(Repo):
    """A superproject: a submodule with another inside, one that is not checked out; LFS files with and without
    their content here (git-lfs is not needed for that)."""

    def __init__(self, site):
        libs, self.large = {}, {}
        for name, files in (("inner", {"deep.c": b"deep\n"}), ("lib", {"x.c": b"x\n", "-y z": b"y\n"}), ("absent", {"a": b"a\n"})):
            libs[name] = Repo(site, name, files=files)
        libs["lib"].git("-c protocol.file.allow=always submodule add -q", str(libs["inner"].dir), INNER)
        libs["lib"].commit("inner")
        super().__init__(site, files={".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"})
        for path, name in ((LIB, "lib"), ("absent", "absent")):
            self.git("-c protocol.file.allow=always submodule add -q", str(libs[name].dir), path)
        self.git("-c protocol.file.allow=always submodule update -q --init --recursive")
        self.lfs("assets/model.bin", CONTENT)
        self.lfs("assets/tool.bin", b"#!/bin/sh\n")
        (self.dir / "assets/tool.bin").chmod(0o755)
        self.lfs("assets/even.bin", bytes(1024))
        self.lfs("gone.bin", b"nowhere", here=False)
        self.lfs("\u00fc" * 90 + "/" + "y" * 120 + ".bin", b"long\n")
        self.lfs("latin\udce9.bin", b"latin\n")
        self.commit("family")
        self.git("submodule --quiet deinit -f absent")

    def lfs(self, path, content, here=True):
        self.write(path, pointer(content))
        if here:
            self.write(lfs_object(content), content)
            self.large[os.fsencode(path)] = content

    def whole(self):
        found = {path: value for path, value in tree_of(self.dir).items() if path.split(b"/")[-1] != b".git"}
        return {**found, **{path: (found[path][0], content) for path, content in self.large.items()}}


def test_submodules_and_lfs_content_travel(site, place):
    family = Family(site)
    before = untouched(family)
    made = family.new(host=place)
    for words in ("1 submodule not checked out", "1 LFS file without content"):
        assert words in made.said
    assert tree_of(family.path()) == family.whole()
    assert family.whole()[b"assets/model.bin"][1] == CONTENT and family.whole()[os.fsencode("%s/%s/deep.c" % (LIB, INNER))]
    nothing_new(family)
    assert family.cli("diff").out == b""
    assert ": sent " not in family.ok(f"new -v -H {place} second").said
    assert tree_of(family.path("second")) == family.whole()
    if place == "box":
        assert family.cli("exec -w main --", "git status --short; git log --format=%s").out == b"base\n"
    assert untouched(family) == before
    family.ok("rm main")
    family.ok("rm second")


def test_changes_in_submodules_are_kept_from_rm(site, place):
    family = Family(site)
    family.new(host=place)
    before = untouched(family)
    script = AGENT + """echo more >>README; echo other >assets/model.bin; echo x >new.bin; cp assets/tool.bin plain; mv assets/tool.bin assets/moved.bin
        cd vendor/li*; echo edit >>x.c; rm -r in*/README; cd ../..; mkdir -p absent; echo agent >absent/new; git add -A; git commit -qm mine; echo u >'vendor/li b "q'"'/untracked"
        """
    do(family, script if place == "box" else script.replace("git add -A; git commit -qm mine", ":"))
    kept = family.cli("rm main")
    assert kept.code == 1 and "submodule" not in kept.said
    pulled = family.ok("pull")
    assert untouched(family) == before
    for path in (LIB + "/x.c", LIB + "/%s/README" % INNER, LIB + "/untracked", "absent/new"):
        assert "left out: %s" % json.dumps(path)[1:-1].replace('\\"', '"') in pulled.said.replace("\\", "")
    assert pulled.said.count("left out") == 4
    changes = ["M\tREADME", "M\tassets/model.bin", "R100\tassets/tool.bin\tassets/moved.bin", "A\tnew.bin", "A\tplain"]
    assert family.git("diff -M --name-status main cmux/main").split("\n") == changes
    assert family.pulled("assets/moved.bin").startswith("version https") and family.pulled("plain") == "#!/bin/sh"
    assert family.git("ls-tree -r cmux/main").count("160000 commit") == 2
    family.git("fsck --strict")
    assert nothing_new(family).said.count("left out") == 4
    for words in ("rm main", "push --ref HEAD~1"):
        kept = family.cli(words)
        refused(kept, 1, "work that would be lost", "-w main -- git status --short, or ")
        assert "README" not in kept.said.replace("/README", "")
    family.ok("push --ref HEAD~1 --force")
    family.ok("rm main")


def test_a_moved_submodule_is_pushed_as_a_delta(site, place):
    family = Family(site)
    family.new(host=place)
    family.write(f"{LIB}/x.c", b"moved\n")
    family.write(f"{LIB}/fresh", b"f\n")
    (family.dir / LIB / "-y z").unlink()
    family.git("-C", LIB, "add", "-A")
    family.git("-C", LIB, "commit", "-qm", "moved")
    family.lfs("assets/tool.bin", b"#!/bin/sh\necho new\n")
    family.commit("submodule moved")
    assert re.search(r"sent \d\d\.\d kB", family.ok("push -v").said)  # the delta, not the 4 MB of all
    assert tree_of(family.path()) == family.whole()
    assert family.cli("diff").out == b"" and "already" in family.cli("push").text
    do(family, "echo work >>README")
    family.ok("pull")
    assert family.changed() == "README"
    family.ok("push --ref HEAD~1")
    assert (family.path() / LIB / "x.c").read_bytes() == b"x\n" and not (family.path() / LIB / "fresh").exists()
    assert family.cli("diff").out == b"" and family.cli("rm main").code == 0


def test_a_workspace_outlives_its_submodule(site):
    family = Family(site)
    family.new()
    shutil.rmtree(family.dir / ".git/lfs")
    family.git("submodule --quiet deinit -f", LIB)
    nothing_new(family)
    do(family, "echo work >>README; echo x >>vendor/li*/x.c")
    pulled = family.ok("pull")
    assert pulled.said.count("left out") == 1
    assert family.changed() == "README"
    do(family, "rm -rf vendor; echo a file >vendor")
    pulled = family.ok("pull")
    assert "left out: vendor (" in pulled.said and "left out: vendor/li" in pulled.said
    assert family.git("ls-tree -r cmux/main").count("160000 commit") == 2
    shutil.rmtree(family.dir / ".git/modules")
    told = family.ok("diff")
    assert "+work" in told.text and "left out: vendor (" in told.said
    assert family.cli("rm main").code == 1 and family.cli("rm main --force").code == 0
    made = family.new("next")
    assert "2 submodules not checked out" in made.said and "6 LFS files" in made.said
    nothing_new(family, "-w", "next")
    assert "already" in family.cli("push -w next").text
    family.lfs("assets/model.bin", CONTENT)
    assert "is at" in family.cli("push -w next").text and family.far("assets/model.bin", "next") == CONTENT


def test_uncommitted_work_in_a_submodule_is_said(site):
    family = Family(site)
    trap = site.dir / "trap"
    evil = script(site.dir / "evil.sh", f"echo ran >>{trap}\ncat")
    for git_dir in (family.dir / ".git/modules").rglob("HEAD"):
        for key in ("filter.evil.clean", "filter.evil.process", "core.fsmonitor", "diff.external"):
            family.git("--git-dir", str(git_dir.parent), "config", key, str(evil)) if (git_dir.parent / "config").exists() else None
        (git_dir.parent / "info").mkdir(exist_ok=True)
        (git_dir.parent / "info/attributes").write_text("* filter=evil\n")
    family.write(LIB + "/x.c", b"z\n")
    os.utime(family.dir / LIB / "x.c", (1, 1))
    assert "1 uncommitted file in submodules" in family.new("clean").said
    family.write("README", b"dirty\n")
    made = family.new("main", "--dirty")
    assert "1 uncommitted file in submodules" in made.said and "1 submodule not checked out" in made.said
    assert family.far("README") == b"dirty\n" and (family.path() / LIB / "x.c").read_bytes() == b"x\n"
    assert not trap.exists()
    family.git("-C", LIB, "-c", "core.fsmonitor=false", "-c", "filter.evil.clean=cat", "commit", "-qam", "moved")
    trap.unlink(missing_ok=True)
    family.ok("push -w main --dirty")
    assert (family.path() / LIB / "x.c").read_bytes() == b"z\n" and not trap.exists()


def test_a_submodule_that_lies_elsewhere_is_none(site):
    """Only what git itself would have put there is read: no link, no foreign owner's idea of a path."""
    lib, repo, secret = Repo(site, "lib"), Repo(site, "top", files={".gitattributes": b"*.bin filter=lfs\n"}), site.dir / "secret"
    top, modules = repo.dir, repo.dir / ".git/modules"
    for folder in (modules / "good", modules / "linked", secret, top / "real/.git", site.dir / "away/.git"):
        shutil.copytree(lib.dir / ".git", folder)
    shutil.rmtree(modules / "linked/objects")
    (modules / "linked/objects").symlink_to(secret / "objects")
    (modules / "escape").symlink_to(secret)
    (top / "link").symlink_to(site.dir / "away")
    (top / "inner-link").symlink_to("real")
    (top / "dotlink").mkdir()
    (top / "dotlink/.git").symlink_to(secret)
    (top / "fifo").mkdir()
    os.mkfifo(top / "fifo/.git")
    paths = ["real", "link", "inner-link", "dotlink", "fifo", "none"]
    for n, text in enumerate((b"gitdir: ../.git/modules/good\n", b"gitdir: %s\n" % os.fsencode(modules / "good"), b"gitdir: ../.git/modules/linked\n",
            b"gitdir: ../.git/modules/escape\n", b"gitdir: %s\n" % os.fsencode(secret), b"gitdir: ../.git/modules/../../../secret\n",
            b"gitdir: ../.git/modules\n", b"gitdir: ../.git\n", b"gitdir: ../.git/modulesx\n", b"\0\n", b"gitdir: a\0b\n",
            b"", b"gitdir: ../.git/modules/good\nx\n", b"x" * 10000)):
        paths.append(f"sub{n}")
        repo.write(f"sub{n}/.git", text)
    for path, size in (("good.bin", 1), ("link.bin", 2), ("size.bin", 3)):
        stored = lfs_object(b"x" * size)
        repo.write(path, pointer(b"x" * size))
        repo.write(stored, b"x" * (size if size < 3 else 1))
        repo.git("add", path)
        if size == 2:
            shutil.move(top / stored, secret / "x")
            (top / stored).symlink_to(secret / "x")
    for path in paths:
        repo.git("update-index --add --cacheinfo", f"160000,{lib.git('rev-parse', 'HEAD')},{path}")
    repo.git("update-ref HEAD", repo.git("commit-tree -p HEAD -m gitlinks", repo.git("write-tree")))
    assert "17 submodules not checked out, 2 LFS files without content" in repo.new().said
    assert {path.name for path in repo.path().iterdir() if (path / "README").exists()} == {"real", "sub0", "sub1"}
    assert repo.far("good.bin") == b"x" and all(repo.far(name)[:7] == b"version" for name in ("link.bin", "size.bin"))


def test_lfs_content_larger_than_a_pull_may_be(site, tuned, place):
    repo = Repo(site, files={".gitattributes": b"*.bin filter=lfs\n"})
    tuned(PULL_FILE_MAX=16 << 20)
    size = (16 << 20) + 4096
    stored = lfs_object(bytes(size))
    repo.write("model.bin", pointer(bytes(size)))
    repo.write(stored, b"")
    os.truncate(repo.dir / stored, size)
    repo.commit("model")
    repo.new(host=place)
    assert (repo.path() / "model.bin").stat().st_size == size
    do(repo, "echo x >>README")
    repo.ok("pull")
    assert repo.changed() == "README"
    do(repo, "echo x >>model.bin")
    for words in ("pull", "rm main"):
        refused(repo.cli(words), 1, "model.bin")
    do(repo, "truncate -s -2 model.bin 2>/dev/null || head -c %d model.bin >m && mv m model.bin; touch -d 2001-01-01T00:00:00 model.bin; mv model.bin moved" % size)
    moved = repo.cli("pull")
    assert moved.code == 1 and "refused" in moved.said


def test_an_old_git_sends_lfs_content(site):
    """Before 2.39; in front of a newer one, a program refuses what those do."""
    family, real = Family(site), program("git")
    env = replaced(site, git=f"""
case " $* " in *" read-tree "[0-9a-f][0-9a-f]* | *" read-tree "*" "[0-9a-f][0-9a-f]*)
  for tree; do :; done; dir=$1
  missing=$({real} "$dir" ls-tree -r "$tree" | grep ' blob ' | cut -c13-52 | {real} "$dir" cat-file --batch-check | grep missing$) &&
    {{ echo "error: invalid object 100644 $missing" >&2; exit 128; }}
esac""")
    for words in (["new", "-H", "box", "main"], ["exec", "--", "echo x >>README; echo y >>assets/tool.bin"], ["pull"]):
        family.ok(*words, env=env)
    assert family.changed() == "README\nassets/tool.bin"
    family.lfs("assets/model.bin", b"other" * 1000)
    family.commit()
    family.ok("push -v", env=env)
    assert family.far("assets/model.bin") == b"other" * 1000


def test_damaged_lfs_content_is_not_sent(site):
    family = Family(site)
    path = family.dir / lfs_object(CONTENT)
    path.write_bytes(b"X" + CONTENT[1:])
    refused(family.cli("new -H box one"), 1, "git lfs fsck")
    path.write_bytes(CONTENT)
    family.new("two")
    family.save("README", b"other")
    shutil.rmtree(family.path("two").parent.parent / ".cmux/bases")
    path.write_bytes(b"X" + CONTENT[1:])
    refused(family.cli("new -H box three"), 1, "assets/model.bin")
    assert set(family.workspaces()) == {"two"}


# === list, rm, fork, rename ===


def test_list_json_has_the_promised_keys(repo, common):
    assert repo.cli("list --json").json == []
    repo.new("a", "b")
    rows = repo.workspaces()
    assert [(row["host"], row["base"]) for row in rows.values()] == [("box", repo.id("HEAD"))] * 2
    assert set(rows["a"]) >= set("name host path base created state behind changed jobs".split())
    where = Path(repo.cli("exec -w a --", "pwd -P").text.strip())
    assert where == repo.path("a") and where.name == "a" and re.match(r"project-\w+$", where.parent.name)
    assert where.parents[1] == common.far_home() / "cmux" and mode_of(where.parents[1]) == 0o700


def test_list_counts_commits_changes_and_jobs(repo, site, line, tuned):
    repo.new("some-name")
    repo.new("far-away", host="far")
    do(repo, "echo x >>README; git commit -qam one; echo y >new", "some-name")
    repo.ok("exec -w some-name --detach --", "sleep 60")
    repo.commit()
    before = {path: path.stat().st_mtime_ns for path in site.far_home().rglob("*")}

    def counts(*more):
        return {row["name"]: [row[key] for key in ("behind", "changed", "jobs")] for row in repo.ok("list --json", *more).json}
    expected = {"some-name": [1, 2, 1], "far-away": [1, 0, 0]}
    assert counts() == counts("--all-projects") == expected
    assert {path: path.stat().st_mtime_ns for path in site.far_home().rglob("*")} == before, "it makes and changes nothing there"
    line.stall()
    for width in (60, 140):
        head, *rows = repo.terminal("list", env={"COLUMNS": str(width)}).talk().output.decode().replace("\r", "").split("\n")[:-1]
        assert re.split("  +", head) == ["NAME", "HOST", "STATE", "BEHIND", "CHANGED", "JOBS", "AGE"] + ["BASE"] and max(map(len, [head, *rows])) <= width
        cells = [[row[head.index(word):].split()[0] for word in ("NAME", "BEHIND", "CHANGED", "JOBS")] for row in rows]
        assert cells == [["far-away", "1", "-", "-"], ["some-name", "1", "2", "1"]]
    began = monotonic()
    assert counts()["far-away"] == [1, None, None] and monotonic() - began < 15
    tuned(TOP_PATIENCE=0.5)
    assert "has not answered" in repo.cli("top -H far").text and "has not answered" in repo.cli("top -H far --json").json[0]["error"]


def test_a_fork_that_fails_frees_its_name(site, repo):
    nobody(site, os.environ["PATH"])
    repo.new(host="nobody")
    do(repo, "mkdir -p go/mod; echo a >go/mod/a; echo b >secret; chmod -R a-w go; chmod 0 secret")
    refused(repo.cli("fork -w main b"), 1, "secret")
    do(repo, "chmod 600 secret")
    repo.ok("fork -w main b")
    repo.ok("rm --force b")


def test_rm_refuses_while_a_command_runs(repo):
    repo.new("main", "two")
    child = repo.start("exec -w main --", "sleep 60")
    until(lambda: repo.cli("top --json").text.count("sleep 60"))
    refused(repo.cli("rm main"), 1, "A command runs in the workspace main", "--force")
    repo.ok("rm two")
    assert repo.path().is_dir()
    repo.ok("rename -w main other")
    repo.new()
    refused(repo.cli("rm other"), 1, "A command runs in the workspace other")  # the name it has now
    assert [(row["workspace"], bool(row["running"])) for row in repo.cli("top --json").json] == [("main", False), ("other", True)]
    repo.ok("rm main")
    os.killpg(child.pid, SIGKILL)
    child.communicate()
    assert until(lambda: repo.cli("rm other").code == 0)


def test_a_forked_child_shares_nothing(repo, site):
    """The copies of our descriptors in a worker of multiprocessing must not keep what this process gives up."""
    site.daemon("other")
    assert in_library(repo, """
import os, signal, warnings
warnings.simplefilter("ignore")        # 3.12 and later say that a process with threads should not fork
project, logs = Project("."), sys.argv[1:]
workspace = project.create("main", "box")
workspace.exec("true")
wait_ready(logs[0])
read, write = os.pipe()
child = os.fork()
if not child:
    os.write(write, b"%d" % workspace.exec("sleep 0.5; exit 7").exit_code)
    os._exit(0)
print(workspace.exec("exit 3").exit_code, os.read(read, 9).decode(), os.waitpid(child, 0)[1])
workspace = project.create("second", "other")
workspace.exec("true")
wait_ready(logs[1])
command = threading.Thread(target=lambda: print(workspace.exec("sleep 30", timeout=1.5).stopped, time.monotonic() - began < 5))
began = time.monotonic()
command.start()
time.sleep(0.7)
child = os.fork()                      # in the middle of that command, and idle
if not child:
    time.sleep(60)
    os._exit(0)
command.join()
workspace.host.close()
wait_ready(logs[1], 0)
def connections():
    with open(logs[1]) as stream:
        return stream.read().count("Accepted ")
before = connections()
with ThreadPoolExecutor(8) as pool:    # the one connection takes as many as ever
    list(pool.map(Project(".", warm=0).workspace("second").exec, ["sleep 1"] * 8))
print(connections() - before)
os.kill(child, signal.SIGKILL)
""", str(site.dir / "log-box"), str(site.dir / "log-other")) == "3 7 0\nconfirmed True\n0\n"


def test_a_renamed_workspace_keeps_its_history_and_jobs(repo, nap):
    repo.new("a")
    repo.cli("exec -w a --", "exit 3")
    job = repo.job(f"echo in; {nap}", options="-w a")
    repo.ok("rename -w a b")
    repo.ok("rename -w b c")
    rows = repo.history("-w", "c")
    assert [row["operation"] for row in rows] == ["new", "exec", "start", "rename", "rename"] and rows[1]["exit_code"] == 3
    assert "Nothing is on record" in repo.cli("history -w x").said
    assert repo.cli(f"logs -w c {job}").out == b"in\n"
    refused(repo.cli("rm c"), 1, job)
    child = repo.start("exec -w c --", "echo on; sleep 3; exit 7")
    until(lambda: any(row["running"] for row in repo.cli("top --json").json))
    repo.ok("rename -w c d")
    repo.new("c")
    assert child.end().code == 7
    assert {name: [row.get("exit_code") for row in repo.history("-w", name) if row["operation"] == "exec"] for name in "cd"} == {"c": [], "d": [3, 7]}
    assert running(nap)
    repo.ok("rm --force d")
    nap.gone()
    repo.new("d")
    assert [row["operation"] for row in repo.history("-w", "d")] == ["new"], "not what was done in another of that name"
    assert repo.cli("jobs -w d --json").json == []


def test_fork_and_rename(repo):
    repo.new()
    do(repo, AGENT + "echo c >>README; git commit -qam mine; echo u >untracked; ln -s README l")
    there = tree_of(repo.path())
    repo.ok("fork -w main second")
    assert tree_of(repo.path("second")) == there
    for verb, name, words in (("fork", "second", "exists already"), ("fork", "main", "has that name already"), ("rename", "main", "has that name already"), ("rename", "second", "exists already")):
        refused(repo.cli(verb, "-w", "main", name), 1, words)
    ran = at_once(2, lambda pair: repo.cli("rename -w", *pair), [("main", "second"), ("second", "main")])
    assert {r.code for r in ran} == {1} and set(repo.workspaces()) == {"main", "second"}
    do(repo, "echo other >untracked", "second")
    assert (repo.path() / "untracked").read_text() == "u\n"
    repo.ok("rename -w second third")
    assert set(repo.workspaces()) == {"main", "third"}
    assert repo.cli("rm third").code == 1
    repo.ok("pull -w third")
    assert repo.pulled("untracked", "third") == "other"
    repo.ok("rm third")
    foreign = repo.path().parent / "foreign"
    foreign.mkdir()
    for verb in ("fork", "rename"):
        refused(repo.cli(verb, "-w", "main", "foreign"), 1)
        assert list(foreign.iterdir()) == []
    assert set(repo.workspaces()) == {"main"} and repo.path().is_dir()


# === read, write, edit ===


def test_an_edit_of_many_places_is_soon_told(area):
    def edited(*edits):
        return str(area("edit", "many", edits=edits)["diff"])
    area.put("many", b"".join(b"line %d of many\n" % n for n in range(19000)))
    assert edited(*({"old": "line %d of" % n, "new": "LINE %d of" % n} for n in range(0, 19000, 19))) == "(too much changed for a diff)"
    ends = edited({"old": "LINE 0 of", "new": "first\nline 0 of"}, {"old": "18999 of many\n", "new": "18999 of many\nlast\n"})
    assert re.findall(r"^\+.*", ends, re.M)[1:] == ["+first", "+line 0 of many", "+last"]


ODD_NAMES = ["it's \"quoted\" `$(x)`", "new\nline", "trailing newline\n", "-rf", "--", "naïve-日本-🐙", "n" * 200, " ", "back\\slash\\n", "a:1:b", "*?[x]", "~", "$HOME", "\t",
    "..x", "%s", "\x1b[31m", "\x7f", "a\rb", "'", "a#b", "é" * 100]


@each("name", ODD_NAMES, ids=ascii)
def test_every_tool_takes_odd_names(talker, area, name):
    for path in (area.p(name), area.p(f"deep/{name}/in {name[:100]}"), str(area.dir / f"abs{name[:190]}")):
        real = area.workspace / path
        assert talker("write", path=path, content="hello there\n")["created"] is True
        assert real.read_bytes() == b"hello there\n"
        assert talker("read", path=path)["content"] == "hello there\n"
        assert "-hello there\n+goodbye there\n" in talker("edit", path=path, edits=swap("hello", "goodbye"))["diff"] and real.read_bytes() == b"goodbye there\n"
        relative = os.path.relpath(str(real), str(area.workspace))
        assert relative in talker("glob", pattern=f"{area.name}/**")["paths"]
        assert {"path": relative, "line": 1, "text": "goodbye there"} in talker("grep", pattern="goodbye", glob=f"{area.name}/**")["matches"]


SOCKET = f"exec {sys.executable} -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"it\")'"


@each("tool", ["read", "write", "edit"])
@each("make, path, words", [
    ("mkfifo it", "it", "not a regular file"), ("", "/dev/null", "not a regular file"), ("", "/dev/zero", "not a regular file"), (SOCKET, "it", "not a regular file"),
    ("mkdir it", "it", "is a directory"), ("ln -s . it", "it", "is a directory"), ("ln -s ti it; ln -s it ti", "it", ""), ("echo >plain", "plain/it", ""), ("", "x" * 300, ""),
    ("", "none", "no file"), ("", "no/such/dir", "no file"), ("ln -s nowhere it", "it", "no file")])
def test_what_is_no_file_is_refused(talker, area, tool, make, path, words):
    subprocess.run(["sh", "-c", make], cwd=area.dir, check=True)
    before = sorted(os.listdir(area.dir))
    arguments = {"read": {}, "write": {"content": "x"}, "edit": {"edits": [{"old": "a", "new": "b"}]}}[tool]
    if tool == "write" and words == "no file":
        return  # it makes one
    assert words in talker.refusal(tool, path=path if path[0] == "/" else area.p(path), **arguments)
    assert sorted(os.listdir(area.dir)) == before


@each("path", ["", "a\0b", 5, None, ["a"], "\ud800"])
def test_impossible_paths_are_refused(talker, path):
    for tool, more in (("read", {}), ("write", {"content": "x"}), ("edit", {"edits": swap("a", "b")})):
        talker.refusal(tool, path=path, **more)


def test_no_write_makes_a_lost_workspace_anew(repo):
    repo.new()
    shutil.rmtree(repo.path())
    for args in ("read x", "write x", "write a/x", "edit x --old a --new b"):
        refused(repo.cli(args, stdin=b"data"), 1, "directory of main is not on box")
    refused(repo.cli("exec --detach -- true"), 125)
    assert not repo.path().exists()


def test_a_path_that_ends_in_a_slash_makes_nothing(area):
    area.put("file", b"old")
    for path in ("fresh/", "fresh/.", "fresh//", "file/", "file/.", "file//"):
        area.refusal("write", path, content="x")
    assert [p.name for p in area.dir.iterdir()] == ["file"] and (area.dir / "file").read_bytes() == b"old"


def test_permissions_are_said_and_kept(ordinary):
    here, edit = ordinary.path(), {"edits": [{"old": "old", "new": "new"}]}
    do(ordinary, "mkdir -p closed/sub shut; for f in unread readonly shut/in; do printf old >$f; done; chmod 0 closed unread; chmod 444 readonly; chmod 555 shut")
    with Agent(ordinary) as talker:
        for tool, more, paths in (("read", {}, "unread"), ("edit", edit, "unread readonly shut/in"),
                ("write", {"content": "x"}, "unread readonly shut/in shut/fresh shut/more/fresh closed/f closed/sub/f closed/new/f")):
            for path in paths.split():
                said = talker.refusal(tool, path=path, **more)
                assert re.search("may not be read or written|Permission denied", said) and not re.search(r"sh: |\d: |\.tmp|cd:", said)
        assert talker("read", path="readonly")["content"] == "old" and talker("grep", pattern="old")["matches"] != []
    refused(ordinary.cli("write shut/fresh", stdin=b"data"), 1)
    assert os.listdir(here / "shut") == ["in"] and {(here / path).read_bytes() for path in ("shut/in", "readonly", "unread")} == {b"old"}
    assert mode_of(here / "readonly") == 0o444


@each("mode", [0o755, 0o640, 0o4755])
def test_write_and_edit_keep_modes_and_links(area, mode):
    real = area.put("sub/real", b"old\n", mode)
    (area.dir / "first").symlink_to("second")
    (area.dir / "second").symlink_to("sub/third")
    (area.dir / "sub/third").symlink_to(str(real))
    area("write", "first", content="written\n")
    assert real.read_bytes() == b"written\n" and mode_of(real) == mode
    area("edit", "second", edits=swap("written", "edited"))
    assert real.read_bytes() == b"edited\n" and mode_of(real) == mode
    assert [os.readlink(area.dir / n) for n in ("first", "second", "sub/third")] == ["second", "sub/third", str(real)]


def test_write_makes_what_is_missing(talker, area):
    for number, target in enumerate(["new dir/new file", "-dash", "line\nbreak\n", "../" + area.name + "/up", "a'b\"c\\"]):
        (area.dir / f"link{number}").symlink_to(target)
        assert area("write", f"link{number}", content=target)["created"] is True
        assert (area.dir / f"link{number}").is_symlink() and (area.dir / target).read_bytes() == target.encode()
    talker("exec", command=f"mkdir -p {area.p('by-hand')}; : > {area.p('by-hand/x')}")
    area("write", "by-tool/x", content="")
    for name in ("", "/x"):
        assert mode_of(area.dir / f"by-tool{name}") == mode_of(area.dir / f"by-hand{name}"), "the host's own"


LINES = b"one\r\ntwo\n\n\xff\xfe four\x0bstill\x0cfour\nfive\rstill five\nsix without end"


@each("offset, limit, filler", [(*row, n) for row in ((1, 1), (2, 2), (3, 1), (4, 2), (6, 5), (7, 1), (5, 0)) for n in (0, 1_700_000) if row[1] or not n])
def test_read_by_lines_splits_at_newlines_only(area, offset, limit, filler):
    """A file below the limit of read is cut up here, a larger one over there: both alike."""
    data = LINES + b"\nfiller" * filler
    area.put("lines", data)
    expected = b"".join(re.findall(rb"[^\n]*\n|[^\n]+\Z", data)[offset - 1: offset - 1 + limit if limit else None])
    read = area("read", "lines", offset=offset, limit=limit)
    assert content(read) == expected and read["size"] == len(data)
    assert read["sha256"] == digest(data)


def test_read_is_bounded_and_says_so(talker, area):
    with open(area.dir / "huge", "wb") as file:
        file.truncate(3 << 30)
    assert "larger than" in area.refusal("read", "huge")
    assert f"cp main:{area.p('huge')} ." in talker.answer(talker.post("read", {"path": area.p("huge")}))["error"]["hint"]
    assert "larger than" in area.refusal("edit", "huge", edits=swap("a", "b"))
    assert talker("read", path="README", offset=10 ** 12)["content"] == ""


def test_read_of_a_file_that_grows_is_consistent(area):
    file = area.put("log", b"x" * 100_000)

    def append():
        sleep(0.0002)
        if end.tell() < 8_000_000:
            end.write(b"more\n" * 20)
    with open(file, "ab", buffering=0) as end, meanwhile(append):
        for _ in range(20):
            read = area("read", "log")
            assert len(content(read)) == read["size"] and digest(content(read)) == read["sha256"]
        assert read["size"] > 100_000


@each("how", ["client killed", "line cut", "client interrupted"])
@each("exists", [True, False])
@promise(7)
def test_a_write_stopped_half_way_changes_nothing(repo, how, exists, line):
    old = os.urandom(8 << 20)
    assert repo.exec("mkdir d", host="far").code == 0
    where = repo.path() / "d"
    if exists:
        (where / "big").write_bytes(old)
        (where / "big").chmod(0o640)
    line.trap = ("up", 4 << 20, line.stall)
    child = repo.start("write d/big", stdin=PIPE)
    feeder = Thread(target=child.communicate, args=(os.urandom(8 << 20),))
    feeder.start()
    until(lambda: not line.flowing.is_set())
    half = [p for p in where.iterdir() if p.name != "big"]
    assert len(half) == 1 and half[0].stat().st_size < 8 << 20, "it is on the way, beside the file"
    if how == "line cut":
        line.drop()
    else:
        kill(child.pid, SIGKILL if how == "client killed" else SIGINT)
    line.go_on()
    feeder.join(60)
    assert child.returncode == {"client killed": -9, "line cut": 255, "client interrupted": 130}[how]
    until(lambda: [p.name for p in where.iterdir()] == (["big"] if exists else []))
    if exists:
        assert (where / "big").read_bytes() == old and mode_of(where / "big") == 0o640
    new = os.urandom(1 << 20)
    repo.ok("write d/big", stdin=new)
    assert (where / "big").read_bytes() == new


def test_a_reader_sees_the_old_or_the_new_file(talker, area):
    versions, seen = [bytes([n]) * 300_000 for n in range(65, 87)], set()
    file = area.put("f", versions[0])
    with meanwhile(lambda: seen.add(slurp(file))):
        for version in versions[1:10]:
            area("write", "f", content_base64=b64(version))
        answers = talker.all([("write", {"path": area.p("f"), "content_base64": b64(version)}) for version in versions[10:]])
    assert all(answer["ok"] for answer in answers) and file.read_bytes() in versions[10:]
    assert len(seen) > 1 and seen <= set(versions)


def test_a_full_disk_keeps_the_old_file(site, repo):
    """The host's limit on file size stands for the disk."""
    site.inetd("full", site.first('ulimit -f 600\ntrap "" XFSZ'))
    repo.new(host="full")
    (repo.path() / "f").write_bytes(b"old")
    refused(repo.cli("write f", stdin=b"x" * 2_000_000), 1)
    assert repo.far("f") == b"old" and not [n for n in os.listdir(repo.path()) if ".cmux-" in n]


def test_a_host_with_only_posix_utilities_has_every_tool(site, nap):
    small_host(site)
    repo = Repo(site, odd=True)
    assert site.ssh("bare", "command -v git bash python3 timeout setsid base64 sha256sum gzip").stdout.split()[1:] == []
    for name in ("main", "second"):
        assert repo.exec("printf '<%s>' \"it's\"; exit 9", host="bare", options=f"-w {name}").ended == (9, b"<it's>", b"")
        repo.arrived(name)
    assert repo.exec(f"echo early; {nap} & {nap}", host="bare", options="--timeout 1").code == 124
    nap.gone()
    with Agent(repo) as talker:
        assert talker("write", path="a/new\nfile", content_base64=b64(BINARY))["created"] is True
        assert content(talker("read", path="a/new\nfile")) == BINARY
        (repo.path() / "link").unlink()
        (repo.path() / "link").symlink_to("plain.txt")
        talker("edit", path="link", edits=swap("plain", "edited"))
        assert repo.far("plain.txt") == b"edited\n" and (repo.path() / "link").is_symlink()
        assert talker("glob", pattern="**/*.txt")["paths"] == sorted(p.decode() for p in repo.tree() if p.endswith(b".txt"))
        assert talker("grep", pattern="edi.ed$")["matches"] == [{"path": "plain.txt", "line": 1, "text": "edited"}]
        job = talker("exec", command="echo hi; exit 7", background=True)["job"]
        assert ended(talker, job) == 7
        assert talker("logs", job=job)["output"] == "hi\n"
        sleeper = talker("exec", command=f"{nap} & {nap}", background=True)["job"]
        nap.runs(2)
        assert talker("stop", job=sleeper)["stopped"] == "confirmed"
        nap.gone()
        assert talker("jobs")["jobs"][0]["job"] == job


@each("before, edits, after", [
    (b"x x x\n", [("x", "y", 3)], b"y y y\n"),
    (b"one\ntwo\n", [("one", "1"), ("two", "2")], b"1\n2\n"),
    (b"a", [("a", "b"), ("b", "c")], b"c"),
    (b"all", [("all", "")], b""),
    (b"one\r\ntwo\r\nthree\n", [("two\r\n", "2\r\n")], b"one\r\n2\r\nthree\n"),
    (b"one\r\ntwo\r\nthree\r\n", [("one\ntwo", "1\n2\n")], b"1\r\n2\r\n\r\nthree\r\n"),
    (b"\xff\xfe\0 word \x80\xc3\n", [("word", "wörd")], b"\xff\xfe\0 w\xc3\xb6rd \x80\xc3\n"),
    ("Grüße 🐙\n".encode(), [("🐙", "\u2028")], "Grüße \u2028\n".encode()),
    (b"r: \\1 \\g<0> $& \\n\n", [("\\1 \\g<0> $& \\n", "\\2 %s {0}")], b"r: \\2 %s {0}\n"),
    (b"aaaa", [("aa", "b", 2)], b"bb"),
    (b"a\nb\nc\nd\ne\nf\ng\nh\n", [("d", "D")], b"a\nb\nc\nD\ne\nf\ng\nh\n"),
    *((b"a%sb\nc\n" % end, [("c", "C")], b"a%sb\nC\n" % end) for end in (b"\x0c", b"\r", "\u2028".encode())),
])
def test_edit_replaces_exactly(area, before, edits, after):
    file = area.put("f", before)
    told = area("edit", "f", edits=[dict(zip(("old", "new", "count"), edit)) for edit in edits])
    assert file.read_bytes() == after and told["sha256"] == digest(after)
    assert told["diff"].startswith(f"--- a/{area.p('f')}\n+++ b/{area.p('f')}\n@@ ")
    if b"\xff" not in before:
        file.write_bytes(before)
        subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=area.workspace, input=told["diff"].encode(), check=True)
        assert file.read_bytes() == after


@each("edits, words", [
    ([{"old": "x", "new": "y"}], ["3 times", "not 1"]),
    ([{"old": "x", "new": "y", "count": 2}], ["3 times", "not 2"]), ([{"old": "aa", "new": "b"}], ["2 times in '", "not 1"]),
    ([{"old": "absent", "new": "y"}], ["0 times"]),
    ([{"old": "only", "new": "y"}, {"old": "absent", "new": "z"}], ["edit 2 of 2", "0 times"]),
    ([{"old": "only", "new": "x"}, {"old": "x", "new": "z", "count": 3}], ["edit 2 of 2", "4 times"]),
    ([{"old": "", "new": "y"}], ["empty"]),
    ([{"old": "only", "new": "only"}], ["same"]),
    ([], ["edits"]), ([{"old": "only"}], []), ([{"old": 1, "new": "y"}], []), ([{"old": "only", "new": "y", "x": 1}], []), ([{"old": "only", "new": "y", "count": 0}], []),
    ([{"old": "only", "new": "\ud800"}], []), ([{"old": "x", "new": "y" * 4000000, "count": 3}], ["would become larger than 10"]),
], ids=lambda value: ascii(value)[:80])
def test_edit_refuses_and_changes_nothing(area, edits, words):
    file = area.put("f", b"x only\nx\n\nx aaa\n")
    before = file.stat()
    said = area.refusal("edit", "f", edits=edits).lower()
    assert all(word in said for word in words)
    assert file.read_bytes() == b"x only\nx\n\nx aaa\n" and file.stat().st_ino == before.st_ino


def test_an_edit_of_an_old_version_is_refused(area):
    file = area.put("f", b"one\n")
    seen = area("read", "f")["sha256"]
    after = area("edit", "f", edits=swap("one", "two"), sha256=seen)["sha256"]
    assert "changed" in area.refusal("edit", "f", edits=swap("two", "three"), sha256=seen)
    assert file.read_bytes() == b"two\n"
    area("edit", "f", edits=swap("two", "three"), sha256=after)
    assert file.read_bytes() == b"three\n"
    area.refusal("edit", "f", edits=swap("three", "four"), sha256="not a digest")


def test_edit_on_the_command_line(shared, area):
    file = area.put("f", b"x = 1\ny = 1\n")
    assert b"-x = 1\n+x = 2\n" in shared.ok("edit", area.p("f"), "--old", "x = 1", "--new", "x = 2").out and file.read_bytes() == b"x = 2\ny = 1\n"
    told = shared.cli("edit", area.p("f"), "--json", stdin=b'{"edits": [{"old": "x = 2", "new": "x = 3"}, {"old": "y", "new": "z"}]}').json
    assert file.read_bytes() == b"x = 3\nz = 1\n" and told["sha256"] == digest(b"x = 3\nz = 1\n")
    refused(shared.cli("edit", area.p("f"), "--old", " = ", "--new", ""), 1, "2 times")
    for bad in (b"", b"[]", b"5", b"null", b'"x"', b"{}", b"\xff", b'{"edits": 1}', b'{"edits": [{"old": "x", "new": "y"}], "more": 1}', b"[" * 100_000):
        refused(shared.cli("edit", area.p("f"), stdin=bad), 2)
    area.put("other", b"x = 3\n")
    shared.cli("edit", area.p("f"), stdin=json.dumps({"path": area.p("other"), "edits": swap("x = 3", "gone")}).encode())
    assert (area.dir / "other").read_bytes() == b"x = 3\n", "the path of the command line counts"


@slow
@promise(7)
def test_edits_from_16_processes_on_one_file_are_all_kept(shared, area):
    file = area.put("list", b"begin\nend\n")
    children = [shared.start("edit", area.p("list"), "--old", "end\n", "--new", f"line {n}\nend\n") for n in range(16)]
    codes = {n: child.end(seconds=120).code for n, child in enumerate(children)}
    lines = file.read_bytes().decode().split("\n")
    assert lines[0] == "begin" and lines[-2:] == ["end", ""]
    assert sorted(lines[1:-2]) == sorted(f"line {n}" for n, code in codes.items() if code == 0), "what was reported, and only that"
    assert set(codes.values()) == {0}


@slow
def test_edits_under_several_names_are_kept(talker, area):
    file = area.put("sub/list", b"begin\nend\n")
    (area.dir / "link").symlink_to("sub/list")
    (area.dir / "way").symlink_to("sub")
    names = [area.p("sub/list"), f"./{area.p('sub/list')}", area.p("sub/../sub/list"), area.p("way/list"), area.p("link"), str(file), area.p("sub//list"), area.p("sub/./list")]
    answers = talker.all([("edit", {"path": names[n % len(names)], "edits": [{"old": "end\n", "new": f"line {n}\nend\n"}]}) for n in range(48)], 120)
    assert sorted(file.read_bytes().decode().split("\n")[1:-2]) == sorted(f"line {n}" for n, answer in enumerate(answers) if answer["ok"])
    assert all(answer["ok"] for answer in answers)


# === cp, new --from ===


def copied(repo, *words, code=0):
    done = repo.cli("cp", *map(str, words))
    assert done.code == code
    return sorted(row.split(" (")[0] for row in re.findall(r"left out: (.*)", done.said))


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if not path.is_symlink()}


@each("tools", [None, "", "busybox"])
def test_cp_brings_files_and_directories_both_ways(site, tools, repo):
    near = site.dir / "near"
    repo.new(host="box" if tools is None else bare_host(site, tools))
    far = repo.path() / "d"
    near.mkdir()
    for name in ("a", "sub/run", "sub/deep/new\nline", "-n", "y" * 200, "\u00e9 \u65e5", "empty", ".gitignore"):
        repo.write(f"d/{name}", name.encode() * 1000 * (name != "empty"), 0o4775 if "run" in name else 0o600)
    (repo.dir / "d/sub/link").symlink_to("../a")
    tree = tree_of(repo.dir / "d")
    (repo.dir / "d/sub/.git").mkdir()
    (repo.dir / "d/out").symlink_to("../src/main.c")
    os.mkfifo(repo.dir / "d/pipe")
    assert copied(repo, "d", ":") == ["out", "pipe", "sub/.git"]
    assert tree_of(far) == tree and modes(far) == {0o644, 0o755}
    (far / "abs").symlink_to("/etc/passwd")
    for name in ("git~1", "\x1b[31m", "a\xad"):
        (far / name).write_bytes(b"x")
    (far / "sub/.git").mkdir()
    refused(repo.cli("cp :d/sub/.git", str(near / "x")), 1, "Nothing of a .git directory")
    os.mkfifo(far / "sub/pipe")
    for source, target, where in (("main:d", near / "new", "new"), (":d", near / "new", "new/d"), (f":{far}", near, "d")):
        left = copied(repo, source, target)
        assert left == ["./sub/.git", "./sub/pipe", "^[[31m", "abs", "a\xad", "git~1"]
        assert tree_of(near / where) == tree and modes(near) == {0o644, 0o755}
    (far / "first").symlink_to("a")
    assert copied(repo, ":d/first", near / "one") == copied(repo, near / "one", ":made/sub/") == copied(repo, near / "one", ":made/two") == []
    assert {(far.parent / path).read_bytes() for path in ("made/sub/one", "made/two")} == {(near / "one").read_bytes()} == {b"a" * 1000}
    assert set(os.listdir(near)) == {"new", "d", "one"} and not list(site.remote.glob("*/cmux/.cmux/stage/*"))


def test_cp_replaces_only_with_force(repo, common):
    repo.new()
    far, near = repo.path(), repo.dir
    (common.dir / "elsewhere").mkdir()
    (near / "link").symlink_to(common.dir / "elsewhere")
    (near / "file").write_bytes(b"mine")
    (near / "there").mkdir()
    (near / "there/src").symlink_to(common.dir / "elsewhere")
    before = untouched(repo)
    for words, said in ((":README file", "--force"), (":README link", "elsewhere"), (":README link/x", "elsewhere"), ("--force :README link", "elsewhere"), (":src there", "--force"),
            (":README .git/hooks/post-checkout", "git"), (":README none/x", "No such file"), (":README none/", "No such file"), (":nowhere x", "no file"), (":README/x x", "no file"),
            ("README :", "exists already"), ("README :../mainx", "not in the workspace"), ("README :/etc/x", "not in the workspace"), ("nowhere :", "No such file"),
            ("README x", "NAME:PATH"), (":a :b", "NAME:PATH"), ("README none:x", "no workspace"), ("-w main main:README x", "More than one"), (f"{common.state} :", "this program's own")):
        refused(repo.cli(f"cp {words}"), 1 if re.search("no (file|work)|exists already$|^--force|^git", said) else 2, words=said)
    assert untouched(repo) == before and os.listdir(common.dir / "elsewhere") == []
    os.chmod(near / "file", 0o600)
    for words in (":README file", ":src file", ":README file", ":src there"):
        assert copied(repo, "--force", *words.split()) == []
    assert (near / "file/README").read_bytes() == b"hello\n" and tree_of(near / "there/src") == tree_of(far / "src")
    (near / "there/src/.git").mkdir()
    refused(repo.cli("cp --force :src there"), 1, words="git repository")
    assert copied(repo, "--force", "src/main.c", ":README") == copied(repo, "--force", "file", ":src/main.c") == []
    assert repo.cli("cp src :size --json").json["size"] == 10
    assert (far / "README").read_bytes() == b"int main;\n" and tree_of(far / "src/main.c") == tree_of(near / "file")


def test_a_copy_loses_nothing_made_in_its_place(repo):
    repo.new()
    repo.write("d/src/mine", b"1")
    assert in_library(repo, """
import os
workspace, look, rename = Project(".").workspace("main"), cmux_ssh.Landing._look, os.rename
def look_first(landing):
    if not look(landing) and hasattr(landing, "new"):
        open("late", "x").close()
def move_first(old, new):
    rename(old, new)
    if str(new).endswith("/old"):
        os.makedirs(old + "/late")
cmux_ssh.Landing._look = look_first
print(raised(workspace.download, "README", "late"))
cmux_ssh.Landing._look, os.rename = look, move_first
print(type(raised(workspace.download, "src", "d", True)).__name__, os.listdir("d/src"))
""").splitlines() == [f"'{repo.dir}/late' exists already; to replace it: --force.", "UsageError ['late']"]
    assert (repo.dir / "late").read_bytes() == b"" and [path.read_bytes() for path in (repo.dir / "d").glob(".cmux-*/old/mine")] == [b"1"]


LIES = {  # what a host says of a copy; those that may come, last
    "nothing": b"", "no head": b"x\n", "another": b"git 0 " + b"1" * 40 + b"\n",
    **{f"path {path!r}": [b"all\n", *files(b"M 100644 :1 " + path)] for path in EVIL},
    "twice": [b"all\n", *files(b"M 100644 :1 a", b"M 100644 :1 a")], "a file and below it": [b"all\n", *files(b"M 100644 :1 a", b"M 100644 :2 a/b", contents=[b"1", b"2"])],
    "through a link": [b"all\n", *files(b"M 120000 :1 a", b"M 100644 :2 a/b", contents=[b"c", b"2"])], "one content for two": [b"all\n", *files(b"M 100644 :1 a", b"M 100644 :1 b")],
    "two for one": [b"file\n", *files(b"M 100644 :1 it", b"M 100644 :2 it/x", contents=[b"1", b"2"])], "a link for a file": [b"file\n", *files(b"M 120000 :1 it")],
    "a directory for a file": [b"file\n", *files(b"M 100644 :1 it/x")], "another for a file": [b"file\n", *files(b"M 100644 :1 x")],
    "a length too short": [b"all\n", *files(b"M 100644 :1 a")[:2], b"1 blob 1\nxx\n"], "too long": [b"all\n", *files(b"M 100644 :1 a")[:2], b"1 blob 9\nxx\n"],
    "a terabyte": [b"all\n", *files(b"M 100644 :1 a")[:2], b"1 blob 1099511627776\nxx\n"], "a content too many": [b"all\n", *files(contents=[b"x"])],
    "too deep": [b"all\n", *files(*(b"M 100644 :1 %d/" % n + b"a/" * 60 + b"x" for n in range(17000)))],
    "left out": [b"note " + b"x" * 5000 + b"\n" + b"note \x1b[31m\n" * 50 + b"all\n", *files(b"M 100644 :1 good", b"M 120000 :2 up", *(b"M 100644 :%d " % (n + 3) + path for n, path in enumerate(ODD)),
                                                                                                contents=[b"x", b"../../x", *(b"x" for _ in ODD)])],
}


def test_no_lie_gets_a_copy_out_of_its_place(site):
    liar = Liar(site)
    said = [b"".join([lie[0], b"\n", lie[2], lie[3], b"\n"]).decode("latin-1") if isinstance(lie, list) else lie.decode() for lie in LIES.values()]
    names = liar.lies(*map(says, said), BEGUN + [("flood", 1, "note x\n")], BEGUN + [("say", 1, "all\n\n"), ("flood", 1, "1\0")], BEGUN + [("say", 1, said[-1][:-20]), ("exit", 0, 255)],
        BEGUN + [("say", 1, said[-1][:-20]), ("wait", 0, 60)], says(said[-1] + "x"), says("", "no", 32), says(said[-1], "bad", 3))
    before = untouched(liar.repo)
    told = json.loads(in_library(liar.repo, """
import json, os
project = Project(".")
cmux_ssh.CALL_PATIENCE = 3
def copy(name):
    told = raised(project.workspace(name).download, "x", "got-" + name)
    return told["notes"] if isinstance(told, dict) else str(told)
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(copy, sys.argv[1:]))))
""", *names, seconds=120))
    good = list(LIES).index("left out")
    assert [text for at, text in enumerate(told) if at != good and (isinstance(text, list) or len(text) > 1000 or not text.isprintable())] == []
    assert len(told[good]) == 41 and all(note.isprintable() for note in told[good])
    assert tree_of(liar.repo.dir / f"got-lie-{good}") == {b"good": ("file", b"x")}
    shutil.rmtree(liar.repo.dir / f"got-lie-{good}")
    assert untouched(liar.repo) == before


@each("way", ["up", "down"])
def test_a_cp_killed_leaves_nothing_half(repo, site, way):
    repo.new()
    for n in range(300):
        repo.write(f"tree/{n}/x", os.urandom(3000))
    tree, rng = tree_of(repo.dir / "tree"), random.Random(7)
    if way == "down":
        assert copied(repo, "tree", ":") == []
    target, words = (repo.path() / "up", ("tree", ":up")) if way == "up" else (repo.dir / "down", (":tree", "down"))
    began = monotonic()
    assert copied(repo, *words) == []
    took = monotonic() - began
    for at in range(8):
        if at < 5:
            shutil.rmtree(target, ignore_errors=True)
        child = repo.start("cp", *words)
        sleep(rng.random() * took)
        killed(child)
        until(lambda: not list(site.remote.glob("*/cmux/.cmux/stage/*")))
        assert not target.exists() or tree_of(target) in (tree, {**tree, **{b"tree/" + path: row for path, row in tree.items()}})


def test_new_from_a_workspace_has_what_is_ignored(site, place):
    repo = Repo(site, files={".gitignore": b"node_modules/\n*.o\n/cache\n/late\n"})
    repo.new(host=place)
    here = repo.path()
    for path in ("node_modules/p/i.js", "x.o", "src/y.o", "gone/z.o", "it's \u00e9.o", "cache", "plain", "src/main.c", "late"):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(b"far")
    (here / "node_modules/link").symlink_to("p")
    repo.write(".cmux/init", b"#!/bin/sh\nls node_modules/p src >seen.o\n", 0o755)
    repo.write(".gitignore", b"node_modules/\n*.o\n/cache\n")
    repo.write("cache", b"near")
    repo.git("add -f cache")
    (repo.dir / "gone").symlink_to("/tmp")
    repo.commit()
    made = repo.cli("new two --from main")
    if place == "nogit":
        return refused(made, 1, words="only git knows")
    assert made.code == 0
    tree = repo.tree()
    assert tree_of(repo.path("two")) == {**tree, b"node_modules/p/i.js": ("file", b"far"), b"node_modules/link": ("link", b"p"), b"x.o": ("file", b"far"), b"src/y.o": ("file", b"far"),
        "it's \u00e9.o".encode(): ("file", b"far"), b"seen.o": ("file", b"node_modules/p:\ni.js\n\nsrc:\nmain.c\ny.o\n")}
    nothing_new(repo, "two")
    assert not os.path.exists("/tmp/z.o")
    refused(repo.cli("new three -H other --from main"), 2, words="is on box")
    refused(repo.cli("new three --from none"), 1, words="no workspace")
    with Mcp(repo, "--manage") as client:
        assert "three" in client("workspace_new", name="three", source="main")
    assert repo.far("x.o", "three") == b"far"


# === glob and grep ===


def test_grep_says_when_a_nul_hides_the_rest(shared):
    do(shared, "mkdir nul && cd nul && { seq 1 30000 | sed 's/00$/ ERROR/'; printf 'x\\0y\\n'; seq 1 9000 | sed 's/00$/ ERROR/'; } >a.log && echo ERROR >b.log && "
        "printf 'E\\0\\nERROR\\n' >c.bin && echo ERROR >d.log")
    try:
        found = shared.cli("grep -w main ERROR --glob nul/** --json").json
        assert {row["path"] for row in found["matches"]} >= {"nul/a.log", "nul/b.log", "nul/d.log"}
        assert found["truncated"]
        assert not shared.cli("grep -w main ERROR --glob nul/[bcd].* --json").json["truncated"]
    finally:
        do(shared, "rm -r nul")


def test_brackets_of_a_glob_are_as_in_sh(shared, area):
    rows = [("x[a&&b]", "x&", "xc"), ("x[a||b]", "x|", "xc"), ("[!]a]x", "bx", "]x"), ("[]a]x", "]x", "bx"), ("[a-c]x", "bx", "-x"), ("[^a]x", "bx", "ax"),
        ("[[]x", "[x", "]x"), ("[!-x]", "5", "x"), ("[!-x]", "a", "-"), ("x[--0]", "x.", "x1")]
    for _, yes, no in rows:
        area.put(yes, b""), area.put(no, b"")
    own = Agent(shared)
    for pattern, yes, no in rows:
        found = own("glob", pattern=area.p(pattern))["paths"]
        assert area.p(yes) in found and area.p(no) not in found, pattern
    assert own.end() == b"", "a warning of re's"


TREE = {"a.py": b"", "b.txt": b"", "[x].py": b"", "src/a.py": b"", "src/b.py": b"", "src/deep/er/c.py": b"", "src/deep/d.txt": b"", ".hidden/e.py": b"", ".dot": b"", "src/.git": b"",
    "sub/.git/f.py": b"", "a b/c d.py": b"", "naïve.py": b"", "日本.py": b"", "back\\slash.py": b"", "x\ny.py": b""}


@each("pattern, expected", [
    ("*.py", ["[x].py", "a.py", "back\\slash.py", "naïve.py", "x\ny.py", "日本.py"]),
    ("**/*.py", [n for n in TREE if n.endswith(".py") and "/.git" not in n]),
    ("**", [n for n in TREE if ".git" not in n]),
    ("src/**", ["src/a.py", "src/b.py", "src/deep/d.txt", "src/deep/er/c.py"]),
    ("src/**/c.py", ["src/deep/er/c.py"]), ("**/er/*", ["src/deep/er/c.py"]),
    ("[[]x].py", ["[x].py"]), ("na[ïi]ve.py", ["naïve.py"]),
    ("./src/*.py", ["src/a.py", "src/b.py"]), (".*", [".dot"]), ("*x?y*", ["x\ny.py"]), ("[b]ack?slash.py", ["back\\slash.py"]),
    ("src", []), ("nothing*", []), ("src?a.py", []), ("src[/]a.py", []), ("**/.git/**", []), ("-name", []),
    ("**/{a,[bc]}.{py,txt}", ["a.py", "b.txt", "src/a.py", "src/b.py", "src/deep/er/c.py"]),
    ("src/{a,{b,deep/er/c}}.py", ["src/a.py", "src/b.py", "src/deep/er/c.py"]), ("src/deep/", ["src/deep/d.txt", "src/deep/er/c.py"]), ("src//./*.py", ["src/a.py", "src/b.py"]),
], ids=ascii)
def test_glob_finds_what_the_pattern_says(talker, workspace, area, pattern, expected):
    for name, data in TREE.items():
        area.put(name, data)
    (area.dir / "empty dir").mkdir()
    for head in ("", "./" if pattern.startswith("./") else str(workspace) + "/"):
        found = talker("glob", pattern=head + area.name + "/" + (pattern[2:] if pattern.startswith("./") else pattern))
        assert found == {"paths": sorted(area.p(n) for n in expected), "truncated": False}


@each("pattern, words", [
    ("/etc/**", "Write it relative to the workspace, as 'src/**/*.py'"), ("~/**", "relative to the workspace"), ("~root/x", "relative"), ("~", "relative"), ("../**", "relative"), ("a/../../b", "relative"),
    ("{src,/etc}/**", "relative"), ("{1..3}.py", "{1,2,3}"), ("{a,b}" * 7, "fewer braces"), ("!*.md", "as '*.py'"), ("[[:digit:]]", "[a-z]"), ("a{b}" * 9999, "shorter"), ("/", "relative"), ("././.", "'**'")])
def test_a_pattern_without_a_match_is_refused(talker, pattern, words):
    for tool, arguments in (("glob", {"pattern": pattern}), ("grep", {"pattern": "x", "glob": pattern})):
        error = talker.answer(talker.post(tool, arguments))["error"]
        assert error["type"] == "UsageError" and words in error["hint"]


def test_the_files_of_a_grep_are_chosen_as_by_glob(talker, workspace, area):
    for name in ("a.py", "b.ts", "sub/c.py", "d.md", "{e}.py", "[f,g].py"):
        area.put(name, b"found-19\n")
    for glob, names in (("*.{py,ts}", ["[f,g].py", "a.py", "b.ts", "sub/c.py", "{e}.py"]), (f"{workspace}/{area.name}/*.py", ["[f,g].py", "a.py", "{e}.py"]), ("*{e}.*", ["{e}.py"]),
            (f"{{{area.name}/sub/**,b.ts}}", ["b.ts", "sub/c.py"]), (f"{workspace}/a.py", []), ("{d,[a,]}.*", ["a.py", "d.md"]), ("?f,g].{py,x}", ["[f,g].py"])):
        assert sorted(m["path"] for m in talker("grep", pattern="found-19", glob=glob)["matches"]) == [area.p(name) for name in names], glob


def test_a_name_that_is_no_text_can_be_read(talker, area):
    with open(os.fsencode(area.dir) + b"/latin-\xe4.txt", "wb") as file:
        file.write(b"needle\n")
    found = talker("glob", pattern=f"{area.name}/*.txt")["paths"]
    assert len(found) == 1 and talker("read", path=found[0])["content"] == "needle\n"
    assert [m["path"] for m in talker("grep", pattern="needle", glob=f"{area.name}/**")["matches"]] == found


def test_grep_finds_lines(shared, talker, area):
    area.put("a.py", b"import os\ndef Test_one():\n    pass # (x|y) a+b\n")
    area.put("sub/b.py", b"no\r\ndef test_two():\r\n")
    area.put("sub/c.txt", "def grün_test\n".encode())
    area.put(".git/d.py", b"def test_hidden\n")
    area.put("bin", b"\0\1 def test_binary\0\n")
    os.mkfifo(area.dir / "pipe")
    (area.dir / "loop").symlink_to("..")

    def grep(pattern, **more):
        told = talker("grep", pattern=pattern, **{"glob": f"{area.name}/**", **more})
        return sorted((m["path"][len(area.name) + 1:], m["line"], m["text"]) for m in told["matches"] if m["path"] != area.p("bin"))
    both = [("a.py", 2, "def Test_one():"), ("sub/b.py", 2, "def test_two():")]
    assert grep(r"\(?[(?]\):|\\d") == both, "each of these is one of grep's"
    assert grep(r"def [Tt]est_(one|two)\(") == both
    assert grep("def test_(one|two)", ignore_case=True) == both and grep("def test_(one|two)") == both[1:]
    assert grep("grün") == [("sub/c.txt", 1, "def grün_test")]
    assert grep(r"\(x\|y\) a\+b") == [("a.py", 3, "    pass # (x|y) a+b")]
    assert grep("^import os$") == [("a.py", 1, "import os")] and grep("nowhere-to-be-found") == []
    assert grep("-e") == [] and grep("--help") == [] and len(grep("^")) == 6
    text = shared.cli(f"grep Test_one --glob {area.name}/**")
    assert (text.code, text.out) == (0, f"{area.p('a.py')}:2:def Test_one():\n".encode())
    assert shared.cli("grep", "nowhere-to-be-" + "found").code == 1


def test_glob_and_grep_are_bounded_and_say_so(talker, area):
    everything = [area.p(f"few/{n:02}") for n in range(20)]
    for n in range(20):
        area.put(f"few/{n:02}", b"")
    assert talker("glob", pattern=area.p("few/*"), limit=20) == {"paths": everything, "truncated": False}
    assert talker("glob", pattern=area.p("few/*"), limit=19) == {"paths": everything[:19], "truncated": True}
    area.put("many", b"needle\n" * 5000 + b"x" * 100_000 + b"needle-in-a-long-line\n")
    all_of = {"glob": f"{area.name}/**"}
    told = talker("grep", pattern="needle", limit=300, **all_of)
    assert len(told["matches"]) == 300 and told["truncated"] is True and told["matches"][299]["line"] == 300
    assert len(talker("grep", pattern="needle", limit=4000, **all_of)["matches"]) == 4000
    exact = talker("grep", pattern="needle", limit=5001, **all_of)
    assert len(exact["matches"]) == 5001 and exact["truncated"] is False
    assert all(len(m["text"]) <= 2000 for m in exact["matches"]), "a minified file does not fill the answer"


def test_impossible_arguments_are_refused(talker):
    job = start_job(talker, "echo hi")
    assert ended(talker, job) == 0, "the workspace has had jobs"
    for tool, rows in {
            "read": [{"path": "README", **bad} for bad in ({"offset": 0}, {"offset": -1}, {"limit": -1})],
            "glob": [*({"pattern": wrong} for wrong in ("", "a\0b", "[z-a]", "\ud800")), {"pattern": "*", "limit": -1}],
            "grep": [*({"pattern": wrong} for wrong in ("(", "[a", "a{2,1}", "", "a\nb", "a\0b", r"\d+", r"[\d.]", r"\\\D", "(?i)a", "x(?:a|b)", "\ud800")),
                     {"pattern": "a", "limit": -1}, {"pattern": "a", "glob": "[z-a]"}],
            "logs": [{"job": job, **bad} for bad in ({"offset": -1}, {"offset": 10 ** 30}, {"wait": -1})],
            "exec": [{"command": "true", "background": True, **bad} for bad in ({"cwd": "no/such"}, {"stdin": "x"}, {"timeout": 5})]}.items():
        for arguments in rows:
            talker.refusal(tool, **arguments)
    assert [row["job"] for row in talker("jobs")["jobs"]][-1] == job, "none was started"
    for unknown in (f"{job}/..", "j00000000", "", "x", "../../etc", "j0000000g", "j000000000", "-f", "j0000000\n", "*", "."):
        assert all("job" in talker.refusal(tool, job=unknown) for tool in ("logs", "wait", "stop")), unknown


def test_searches_are_read_in_linear_time(site):
    size, answer, plain = 400_000, site.dir / "answer", site.dir / "plain"
    site.daemon("search", env=replaced(site, find=f"[ ! -e {answer} ] || exec cat {answer}", head=f"[ ! -e {answer} ] || exec cat",
        grep=f'[ ! -e {plain} ] || case "$*" in *--null*) exit 2;; esac'))
    said = b"x\n" * 1000000 + b"grep: ./a: binary file matches\n"
    with Agent(Repo(site), "-H search") as talker:
        def found(data):
            answer.write_bytes(data)
            told = talker("grep", pattern="x")
            return [(row["path"], row["line"], row["text"]) for row in told["matches"]], told["truncated"]
        assert talker("glob", pattern="README")["paths"] == ["README"]
        for null in (True, False):
            plain.touch() if not null else None
            for data in (b"./" * size, b"./:1:" * size, b":" * size, b"./a" + b":1" * size, b"./x/\0" * size, b"\0" * size):
                assert len(found(data)[0]) <= 1
            assert found(b"./a\nb\x003:x:4:y\n./c\x001:\nrest" if null else b"./a:b:3:x:4:y\nnoise\n./c:1:\n./d:0\n") == (
                [("a\nb" if null else "a:b", 3, "x:4:y"), ("c", 1, "")], False)
            if null:
                assert found(said + b"./a\0" + b"1:row\n" + said + b"./b\0" + b"2:row\n") == ([("a", 1, "row"), ("b", 2, "row")], True)


def test_grep_misses_nothing_without_saying_so(talker, area):
    for n in range(4):
        area.put(f"src/sub{n}/x.py", b"needle\n" * 1500)
        area.put(f"src/own{n}.py", b"needle\n")
    told = talker("grep", pattern="needle", glob=f"{area.name}/src/*.py")
    assert told["truncated"] and {m["path"] for m in told["matches"]} <= {area.p(f"src/own{n}.py") for n in range(4)}


@each("lang", ["C", "C.UTF-8"])
def test_grep_reads_files_in_other_encodings(site, lang):
    site.inetd("other", env={"LANG": lang, "LC_ALL": lang})
    repo = Repo(site, files={"latin.c": b"/* Gr\xfc\xdfe */\nint needle;\n", "utf.c": "/* Grüße */ int needle;\n".encode(), "naïve.c": b"x\n"})
    with Agent(repo, "-H other") as talker:
        assert sorted((m["path"], m["line"]) for m in talker("grep", pattern="needle")["matches"]) == [("latin.c", 2), ("utf.c", 1)]
        assert talker("glob", pattern="na?ve.c")["paths"] == ["naïve.c"]


# === jobs: --detach, logs, wait, stop ===


def test_a_slow_supervisor_is_waited_for(site, repo):
    site.inetd("slow", env=replaced(site, setsid=f"""case "$1 $2" in "-f true") ;; "-f "*) shift
exec {program("setsid", "util-linux")} -f sh -c 'sleep 2.5; exec "$@"' sh "$@";; esac"""))
    started = repo.ok("exec -H slow --detach --", "echo ran")
    assert re.match(r"j[0-9a-f]{8}\n", started.text)
    repo.ok("wait", started.text.strip())
    assert repo.cli("logs", started.text.strip()).out == b"ran\n"


def test_jobs_of_a_busybox_host_run_and_hold_up_rm(site, repo, nap):
    site.inetd("busy", env={"PATH": posix_tools(site.dir / "busy", "git", "setsid", "stat", "timeout")})
    job = repo.job(f"echo begun; {nap}; exit 7", host="busy")
    rows = repo.cli("jobs --json").json
    assert [row["state"] for row in rows if row["job"] == job] == ["running"]
    refused(repo.cli("rm main"), 1, "a job that runs")
    refused(repo.cli("grep ("), 1, "pattern")
    repo.ok(f"stop {job}")
    nap.gone()
    repo.ok("rm main")


def test_a_job_is_told_though_no_state_is_kept(repo):
    repo.new()
    Path(f"{repo.record()}.lock").mkdir()
    refused(repo.cli("new other -H box"), 1)
    started = repo.ok("exec --detach --", "sleep 30")
    assert repo.cli("logs", started.text.strip(), "--json").json["state"] == "running"
    repo.ok("stop", started.text.strip())


def start_job(talker, command, **more):
    told = talker("exec", command=command, background=True, **more)
    assert set(told) == {"job"}
    return str(told["job"])


def ended(talker, job):
    return talker("wait", job=job, timeout=15)["exit_code"]


def state(talker, job):
    row = next(row for row in talker("jobs")["jobs"] if row["job"] == job)
    return row["state"], row["exit_code"]


def test_a_job_gets_what_exec_gets(talker, workspace, area):
    command = 'umask; pwd; echo "$CMUX_RUNTIME $A $GIT_TERMINAL_PROMPT"; cat; echo err >&2; printf "\\0\\377"; cat "$0" 2>/dev/null'
    job = start_job(talker, command, cwd=area.name, env={"A": "it's\n\"$x\""})
    assert ended(talker, job) == 1
    told = talker("logs", job=job)
    assert base64.b64decode(told["output_base64"]) == f"{talker('exec', command='umask')['stdout']}{area.dir}\nssh it's\n\"$x\" 0\nerr\n".encode() + b"\0\xff"
    assert told["state"] == "exited" and told["next_offset"] == told["size"] == len(base64.b64decode(told["output_base64"]))
    assert base64.b64decode(talker("logs", job=job, offset=told["size"] - 2)["output_base64"]) == b"\0\xff"
    assert talker("logs", job=job, offset=told["size"] + 100)["output"] == ""
    signals = start_job(talker, "trap 'echo int; exit 5' INT; kill -INT $$; echo ignored")
    assert ended(talker, signals) == 5, "a job may catch SIGINT: it is not ignored from the start"


def test_jobs_are_listed_with_what_they_are(shared, talker, area):
    first = start_job(talker, f": {area.name}; printf 12345; exit 3")
    talker("wait", job=first, timeout=15)
    second = start_job(talker, ["sh", "-c", f"while [ ! -e {area.p('go')} ]; do sleep 0.05; done"])
    rows = {row["job"]: row for row in talker("jobs")["jobs"]}
    assert rows[first]["command"] == f": {area.name}; printf 12345; exit 3" and rows[first]["output_size"] == 5
    assert (rows[first]["state"], rows[first]["exit_code"], rows[second]["state"], rows[second]["exit_code"]) == ("exited", 3, "running", None)
    assert abs(rows[first]["started"] - time.time()) < 120 and list(rows).index(first) < list(rows).index(second), "oldest first, also within a second"
    began = monotonic()
    assert talker("wait", job=second, timeout=0.5)["state"] == "running" and monotonic() - began < 5
    assert shared.cli("logs -f --json", first).rows == [{"output": "12345"}, {"state": "exited", "exit_code": 3}]
    quick = shared.cli(f"wait {second} --timeout 0.2")
    assert quick.code == 124 and quick.said
    area.put("go", b"")
    shared.ok(f"wait {second}")
    assert shared.cli(f"wait {first}").code == 3
    assert shared.cli(f"logs {first}").out == b"12345" and shared.cli(f"logs {first} --offset 3").out == b"45"


def test_logs_waits_for_more_and_no_longer(talker, area):
    job = start_job(talker, f"printf a; while [ ! -e {area.p('1')} ]; do sleep 0.05; done; printf b; while [ ! -e {area.p('2')} ]; do sleep 0.05; done")
    assert talker("logs", job=job, wait=10)["output"] == "a"
    waiting = talker.post("logs", {"job": job, "offset": 1, "wait": 15})
    area.put("1", b"")
    told = talker.answer(waiting)["result"]
    assert (told["output"], told["next_offset"], told["state"], told["exit_code"]) == ("b", 2, "running", None)
    began = monotonic()
    assert talker("logs", job=job, offset=2, wait=0.3)["output"] == "" and monotonic() - began < 5
    ending = talker.post("logs", {"job": job, "offset": 2, "wait": 30})
    area.put("2", b"")
    assert talker.answer(ending, 10)["result"]["state"] == "exited"
    assert talker("wait", job=job)["exit_code"] == 0


@each("command", ["{n} & {n}", pytest.param("trap '' TERM INT HUP; {n} & {n}; {n}", marks=slow), "setsid {n} & (setsid {n} &) ; {n}",
    "bash -c 'set -m; {n} & disown; {n}'"])
@promise(6)
@compat
def test_stop_ends_the_whole_tree_and_says_so(talker, command, nap):
    job, other = start_job(talker, "echo here; " + command.format(n=nap)), start_job(talker, f"{nap}9")
    nap.runs(2)
    told = talker("stop", job=job)
    assert told["stopped"] == "confirmed" and told["job"] == job
    assert not running(nap), "confirmed means that it has ended"
    assert (told["state"], told["exit_code"]) == state(talker, job) == ("stopped", 137 if "trap" in command else 143)
    assert talker("logs", job=job)["output"].startswith("here\n") and talker("wait", job=job, timeout=5)["exit_code"] == told["exit_code"]
    assert state(talker, other) == ("running", None) and talker("stop", job=other)["stopped"] == "confirmed"
    assert talker("stop", job=job)["stopped"] == "confirmed", "again is no error"
    assert talker("logs", job=other)["output"] == "", "no word of the shell that watches it"


def record_of(repo, job):
    return next(p for p in repo.site.far_home().rglob(job) if p.is_dir())


def test_stop_ends_nothing_of_a_hidden_stranger(tmp_path, nap):
    """Where there is no /proc, or it may not be read, the old pid alone would make a stranger's children ours."""
    record = tmp_path / "j0123abcd"
    record.mkdir()
    with stranger("sh", "-c", f"setsid {nap} & wait") as other:
        nap.runs()
        for name, text in (("pid", other.pid), ("exit", 0), ("out", "")):
            (record / name).write_text(f"{text}\n")
        assert b"exited 0\n" in without_proc(c.STOP, str(record), record.name) and other.poll() is None and running(nap)
        kill(running(nap)[0].pid)


def test_stop_ends_no_stranger_with_a_jobs_old_pid(shared, talker, nap):
    """One that finished; and one whose record was cut off, as by a crash of the host: it is lost, not running."""
    done, job = start_job(talker, "exit 3"), start_job(talker, nap)
    assert ended(talker, done) == 3
    nap.runs()
    record = record_of(shared, job)
    for process in running(job):
        kill(process.pid)
    kill(int((record / "pid").read_text()))
    for process in running(nap):
        kill(process.pid)
    until(lambda: state(talker, job)[0] == "lost")
    assert talker("wait", job=job, timeout=5)["state"] == "lost" and shared.cli(f"wait {job}").code == 1
    with stranger(*nap.split()) as other:
        for old, told in ((job, ("lost", None)), (done, ("exited", 3))):
            (record_of(shared, old) / "pid").write_text(f"{other.pid}\n")
            assert state(talker, old) == told
            talker("stop", job=old)
            assert other.poll() is None
        assert state(talker, done) == ("exited", 3)


def test_logs_of_a_large_output_are_whole(shared, talker):
    job = start_job(talker, "seq 400000")
    assert talker("wait", job=job, timeout=30)["exit_code"] == 0
    whole = "".join(f"{n}\n" for n in range(1, 400001)).encode()
    part = talker("logs", job=job)
    assert 0 < len(part["output"]) < len(whole) and part["next_offset"] == len(part["output"]) and part["size"] == len(whole)
    assert shared.cli(f"logs {job}").out == whole and shared.cli(f"logs -f {job} --offset 1000000").out == whole[1000000:]


def test_a_job_keeps_its_secret_out_of_its_record(repo, common):
    needle = os.urandom(8).hex()
    repo.secret("KEY", needle)
    with watched(needle.encode()) as looks:
        job = repo.job("echo ${#KEY}; while [ ! -e go ]; do sleep 0.05; done")
        until(lambda: repo.cli(f"logs {job}").out == b"16\n")
        until(lambda: len(looks) > 3)
    assert not any(looks) and files_holding(common.far_home(), needle.encode()) == []
    (repo.path() / "go").touch()
    repo.ok(f"wait {job}")


@each("command", ["wait", "logs -f"])
def test_wait_and_logs_f_say_that_the_host_is_down(repo, command, site, line):
    job = repo.job("echo on; while [ ! -e go ]; do sleep 0.05; done; echo off", host="far")
    sessions = site.log().count("Starting session")
    terminal = repo.terminal(f"{command} {job}")
    until(lambda: site.log().count("Starting session") > sessions)
    line.refuse = True
    line.drop()
    terminal.expect(b"far.* Trying again for up to 5 minutes\\.")
    line.refuse = False
    (repo.path() / "go").touch()
    assert terminal.wait() == 0
    assert b"answers again" in terminal.output and terminal.output.count(b"Trying again") == 1


def test_what_no_time_mends_ends_a_wait(repo, site):
    job = repo.job("sleep 60")
    site.known_hosts.write_text(f"rig {public(site.keys.other_host)}\n")
    site.strike()
    refused(repo.cli(f"wait {job}"), 255, "has changed")


@slow
@promise(7)
def test_logs_f_prints_each_line_once_over_three_cuts(repo, line):
    steps = "for step in 0 1 2 3; do for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do [ $n = 15 ] && printf 'line ' && {gate}; " \
        "[ $n = 15 ] || printf 'line '; echo $((step*15+n)); done; done; exit 9"
    gate = "while [ ! -e gate$step ]; do sleep 0.05; done"
    job = repo.job(steps.format(gate=gate), host="far")
    where = repo.path()
    child = repo.start(f"logs -f {job}")
    whole, seen = "".join(f"line {n}\n" for n in range(1, 61)).encode(), b""
    for step in range(4):
        target = whole[: whole.index(b"line %d\n" % (step * 15 + 15)) + 5]
        while len(seen) < len(target):
            assert select.select([child.stdout], [], [], 60)[0], (step, seen)
            data = os.read(child.stdout.fileno(), 65536)
            assert data, (seen, child.stderr.read())
            seen += data
        assert seen == target
        if step < 3:
            line.drop()
        (where / f"gate{step}").touch()
    ran = child.end()
    assert seen + ran.out == whole and ran.code == 0
    assert line.connections >= 4 and repo.cli(f"wait {job}").code == 9


def test_stdin_for_a_job_is_refused(repo):
    repo.new()
    refused(repo.cli("exec --detach --", "wc -c", stdin=b"data"), 125, "write -w main FILE")
    with open(repo.dir / "README", "rb") as file:
        assert repo.start("exec --detach --", "wc -c", stdin=file).end().ended[:2] == (125, b"")
    assert repo.cli("jobs --json").json == [], "nothing was started"
    repo.ok("exec -n --detach -- true", stdin=b"data")
    idle = repo.start("exec --detach -- true", stdin=PIPE)  # as a harness leaves it open
    assert idle.wait(PATIENCE) == 0


def test_gc_frees_jobs_that_ended_a_week_ago(repo, site):
    repo.new()
    old, new, runs = (repo.job(script) for script in ("echo old", "echo new", "sleep 600"))
    assert repo.cli(f"wait {old}").code == repo.cli(f"wait {new}").code == 0
    for part in site.far_home().glob("cmux/.cmux/jobs/*/*/*/*"):
        os.utime(part, (time.time() - 8 * 86400,) * 2) if new not in part.parts else None
    bases = site.far_home() / "cmux/.cmux/bases"
    (bases / "old").mkdir()
    for base in bases.iterdir():
        os.utime(base, (time.time() - 16 * 86400,) * 2)
    repo.ok("gc")
    assert os.listdir(bases) == [repo.id("HEAD^{tree}")]
    assert {path.name for path in site.far_home().glob("cmux/.cmux/jobs/*/*/*")} == {new, runs}
    repo.ok(f"stop {runs}")


def other_server(site, kind):
    """Dropbear or tinyssh with a home of its own: both look for keys in the passwd home, so that
    directory is mounted over, in a mount namespace of the server's own."""
    home = site.far_home(kind)
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/authorized_keys").write_text(public(site.keys.user) + "\n")
    (home / ".ssh/authorized_keys").chmod(0o600)
    (home / ".ssh").chmod(0o700)
    home.chmod(0o700)
    real = os.path.expanduser("~" + getpass.getuser())
    hidden = f"{program('unshare', 'util-linux')} {'-m' if os.geteuid() == 0 else '-rm'} sh -c 'mount --bind {home} {real} && exec \"$@\"' sh "
    if kind == "dropbear":
        key = site.dir / "dropbear-key"
        subprocess.run([program("dropbearconvert", "dropbear-bin"), "openssh", "dropbear", str(site.keys.host), str(key)], check=True,
            stdout=DEVNULL, stderr=DEVNULL)
        port = free_port()
        with open(site.dir / "log-dropbear", "ab") as log:
            site.daemons.append(subprocess.Popen(shlex.split(hidden) + [program("dropbear", "dropbear-bin"), "-F", "-E", "-s", "-r", str(key), "-p",
                f"127.0.0.1:{port}", "-P", str(site.dir / "pid")], stderr=log, stdin=DEVNULL))
        until(lambda: answers(port))
        return site.at(kind, port, "KexAlgorithms curve25519-sha256")
    made = site.dir / "tinyssh-keys"
    subprocess.run([program("tinysshd-makekey", "tinysshd"), "-q", str(made)], check=True)
    shown = subprocess.run([program("tinysshd-printkey", "tinysshd"), str(made)], check=True, stdout=PIPE).stdout.decode()
    with open(site.known_hosts, "a") as known:
        known.writelines(f"tiny {line}\n" for line in shown.splitlines() if line.startswith("ssh-ed25519"))
    start = script(site.dir / "tinyssh", f"exec {hidden}{program('tinysshd')} -l {made} 2>>{site.dir}/log-tinyssh")
    return site.host(kind, f"ProxyCommand {start}", "HostKeyAlias tiny", "KexAlgorithms curve25519-sha256")


@each("kind", ["dropbear", "tinyssh"])
def test_the_main_job_works_on_servers_that_are_not_openssh(site, kind, nap):
    host, repo = other_server(site, kind), Repo(site, odd=True)
    repo.secret("TOKEN", b"it's $x")
    assert repo.exec("printf '<%s>' \"$TOKEN\"; echo oh >&2; exit 9", host=host).ended == (9, b"<it's $x>", b"oh\n")
    assert repo.exec("exit 255", host=host).code == 255 and repo.exec("kill -9 $$", host=host).code == 137
    big = os.urandom(1 << 20)
    assert repo.exec("cat", host=host, stdin=big).out == big
    late = repo.exec(f"echo early; {nap} & {nap}", host=host, options="--timeout 1")
    assert late.code == 124 and late.out == b"early\n"
    nap.gone()
    repo.ok("write made", stdin=big)
    assert repo.cli("read made").out == big
    repo.ok("edit plain.txt --old plain --new edited")
    job = repo.job("echo in; exit 6", host=host)
    assert repo.cli(f"wait {job}").code == 6 and repo.cli(f"logs {job}").out == b"in\n"
    runs = at_once(12, lambda n: repo.exec(f"echo {n}", host=host), range(12))
    assert [r.out for r in runs] == [b"%d\n" % n for n in range(12)]
    repo.ok("pull")
    assert repo.pulled("plain.txt") == "edited"
    repo.commit("next")
    repo.ok("push")
    assert repo.cli("diff").out == b""
    repo.ok("rm main")
    assert not repo.workspaces()
    assert site.cli(f"doctor {host} --json").code == 0


# === Several workspaces at once ===


def test_new_makes_several_at_once(repo):
    names = [f"w{n}" for n in range(6)]
    repo.new(*names)
    assert set(repo.workspaces()) == set(names) and all(tree_of(repo.path(n)) == repo.tree() for n in names)
    again = repo.cli("new -H box w1 w9")
    assert again.code == 1 and "w1" in again.said
    do(repo, "echo keep >kept", "w1")
    place = repo.path("w1").parent
    repo.ok("rm --force", *names, "w9")
    assert repo.workspaces() == {} and not list(place.iterdir())


def test_a_pool_of_hosts_is_filled_evenly(repo, site):
    site.daemon("b")
    site.daemon("c")
    site.host("dead", "ProxyCommand false")

    def spread():
        return [[row["host"] for row in repo.recorded().values()].count(host) for host in ("box", "b", "c")]
    repo.ok("new -H box -H b -H c", *[f"w{n}" for n in range(7)])
    ran = at_once(3, lambda n: repo.exec("true", options=f"-H b -H c -w x{n}"), range(3))
    assert [r.code for r in ran] == [0] * 3 and sorted(spread()) == [3, 3, 4]
    done = repo.ok("new", *[f"y{n}" for n in range(10)], env={"CMUX_SSH_HOST": "dead box b  c"})
    assert sorted(spread()) == [6, 7, 7] and done.said.count("dead is passed over") == 1
    assert repo.cli("new none", env={"CMUX_SSH_HOST": "dead dead"}).code == 255 == repo.cli("new none -H dead -H nowhere.invalid").code
    assert repo.ok("rm -H b -H box -H c w0 w1 w2 w3")
    refused(repo.cli("rm -H dead -H none w4"), 2, words="not on dead or none")
    for host in ("b", "c"):
        repo.git(f"config --add cmux.host {host}")
    repo.ok("rm", *repo.recorded())
    assert in_library(repo, """
project = Project(".", host=["box", "c"])
print(*(project.ensure(name).host.name for name in "abcd"), Project(".", host="b").ensure("e").host.name)
print(*sorted(Project(".").ensure(name).host.name for name in "fgh"))
""") == "box c box c b\nb b c\n"


@slow
def test_exec_in_20_workspaces_gives_each_its_own_result(repo):
    names = [f"w{n:02}" for n in range(20)]
    repo.new(*names, seconds=120)
    told = repo.cli("exec --all --json --", 'echo "$CMUX_WORKSPACE"; pwd; echo err >&2; n=${CMUX_WORKSPACE#w}; exit ${n#0}')
    rows = {row["workspace"]: row for row in told.json}
    assert list(rows) == names and told.code == 19
    for n, name in enumerate(names):
        where = repo.workspaces()["w00"]["path"].replace("w00", name)
        assert (rows[name]["exit_code"], rows[name]["stdout"], rows[name]["stderr"], rows[name]["error"]) == (n, f"{name}\n{where}\n", "err\n", None)
    text = repo.cli("exec", *sum((["-w", n] for n in names), []), "-j", "3", "--", 'echo "in $CMUX_WORKSPACE"; printf last')
    assert sorted(text.text.splitlines()) == sorted([f"{n} | in {n}" for n in names] + [f"{n} | last" for n in names]) and text.code == 0
    assert "20 of 20" in text.said


def test_results_are_kept_when_one_of_several_is_lost(repo, nap, line):
    repo.new("near")
    repo.new("away", host="far")
    command = f'echo early; printf part; [ $CMUX_WORKSPACE = near ] || {nap}'
    for json_wanted in (True, False):
        child = repo.start("exec -w near -w away", *(["--json"] if json_wanted else []), "--", command)
        nap.runs()
        line.drop()
        ran = child.end()
        assert ran.code == 255
        if json_wanted:
            rows = {row["workspace"]: row for row in ran.json}
            assert rows["near"]["exit_code"] == 0 and rows["near"]["stopped"] is None and rows["near"]["stdout"] == "early\npart"
            assert rows["away"]["exit_code"] == 255 and rows["away"]["error"] and rows["away"]["stdout"] == "early\npart"
        else:
            assert sorted(ran.text.splitlines()) == ["away | early", "away | part", "near | early", "near | part"]
            assert "1 of 2" in ran.said and "away (255" in ran.said
        nap.gone()


def test_a_stop_over_several_keeps_what_was_said(repo, nap):
    repo.new("a", "b", "c")
    command = f'echo "early $CMUX_WORKSPACE"; [ $CMUX_WORKSPACE = a ] && exit 4; sleep 1; {nap}'
    child = repo.start("exec --all --json --", command)
    nap.runs(2)
    os.killpg(child.pid, SIGINT)
    ran = child.end()
    rows = {row["workspace"]: row for row in ran.json}
    assert ran.code == 130 and {n: r["exit_code"] for n, r in rows.items()} == {"a": 4, "b": 130, "c": 130}
    assert {n: r["stdout"] for n, r in rows.items()} == {n: f"early {n}\n" for n in "abc"}
    nap.gone()
    late = repo.cli("exec --all --timeout 2 --", command)
    assert late.code == 124 and "b, c (124: stopped, its processes have ended)" in late.said


def test_the_step_at_work_has_a_live_line(repo, line):
    repo.write("big", os.urandom(12 << 20))
    repo.save(".cmux/init", b"#!/bin/sh\nprintf 'one\\033[2J\\007\\rred\\n'; sleep 2; printf two\n", 0o755)
    line.rate = 4e6
    seen = repo.terminal("new -H far a b").talk(rb"[ab]  sending [\d.]+ MB[^\r]* \(and 1 more\)", b"", rb"[ab]  init hook \d+s")
    shown = sorted(filter(None, seen.lines()))
    assert shown[:2] == ["a  far:%s" % repo.path("a"), "a | red^[[2J^G"] and shown[2:4] == ["a | two", "b  far:%s" % repo.path("b")]
    assert len(shown) == 6
    line.rate = float("inf")
    seen = repo.terminal("exec -w a -w b --", 'echo "in $CMUX_WORKSPACE"; [ $CMUX_WORKSPACE = a ] || exit 3; sleep 3')
    seen.talk(rb"a  running \d+s\x1b\[K", code=3)
    shown = sorted(filter(None, seen.lines()))
    assert shown[:2] == ["a | in a", "b | in b"] and len(shown) == 3 and "1 of 2" in shown[2]


def test_many_workspaces_take_one_line(repo):
    names = [f"w{n:02}" for n in range(14)]
    repo.new(*names)
    for env in ({}, {"TERM": "dumb"}):
        seen = repo.terminal("exec --all -j 7 --", "sleep 2; echo x", env=env)
        if not env:
            seen.expect(rb"w0\d  running \d+s \(and 6 more\)\x1b\[K")
        assert seen.wait() == 0
        shown = list(filter(None, seen.lines()))
        assert len(shown) == 15 and all(" | x" in text for text in shown[:14]) and "14 of 14" in shown[14]
        assert (b"\x1b" in seen.output) == (not env)
    piped = repo.cli("exec -w w00 -w w01 --", "sleep 1.5; echo x")
    assert piped.out.count(b" | x\n") == 2 and len(piped.err.splitlines()) == 1 and b"\x1b" not in piped.err


def test_several_workspaces_bad_use_is_said(repo):
    repo.new("a", "b")
    both = ["exec", "-w", "a", "-w", "b"]
    one_missing = repo.cli(*both, "-w", "nowhere", "--json", "--", "echo here")
    rows = {row["workspace"]: row for row in one_missing.json}
    assert one_missing.code == 125 and rows["a"]["stdout"] == "here\n" and rows["nowhere"]["error"]["message"]
    assert repo.cli("exec -w a -w a --", "echo once").out == b"once\n"
    repo.ok(*both, "-n", "-j", "1", "-q", "--", "cat", stdin=b"not for many")
    ours, theirs = socket.socketpair()
    ours.shutdown(socket.SHUT_WR)
    read, write = os.pipe()
    for stdin, code in ((theirs, 0), (DEVNULL, 0), (read, 0), (read, 125)):  # only bytes that wait are refused
        os.write(write, b"x") if code else None
        ran = repo.start(*both, "--", "true", stdin=stdin).end()
        assert ran.code == code and ("to none of several workspaces" in ran.said) == bool(code)


# === batch ===


def calls(commands, **more):
    return b"".join(json.dumps({"id": n, "tool": "exec", "arguments": {"command": command}, **more}).encode() + b"\n" for n, command in enumerate(commands))


class Client:
    """A program that answers lines with lines, in any order: they are read as they come, and kept until they are asked for."""

    def __init__(self, repo, *words):
        self.child, self.count, self.answers, self.others, self.lines = repo.start(*words, stdin=PIPE), 0, {}, [], []
        self.changed = threading.Condition()
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.child.stdout:
            message = json.loads(line)
            with self.changed:
                self.lines.append(line)
                if isinstance(message, dict) and message.get("id") is not None:
                    self.answers[message["id"]] = message
                else:
                    self.others.append(message)
                self.changed.notify_all()

    def send(self, line):
        self.child.say(line + b"\n")

    def answer(self, number, seconds=PATIENCE):
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.answers, seconds), f"no answer to {number}: {self.others}"
            return self.answers.pop(number)

    def other(self, seconds=PATIENCE):
        with self.changed:
            assert self.changed.wait_for(lambda: self.others, seconds), "nothing came"
            return self.others.pop(0)

    def end(self, seconds=60):
        """Nothing more is asked: what it says on stderr until it has ended."""
        self.child.stdin.close()
        self.child.wait(seconds)
        self.reader.join(seconds)
        return self.child.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            said = b"" if kind else self.end()
            assert b"Traceback" not in said and (kind or self.child.returncode == self.code())
        finally:
            self.child.kill()
            self.child.wait()


class Agent(Client):
    """A `batch` that stays open: a tool call is a line to it, and its answer one from it."""

    def code(self):
        return int(any(not json.loads(line)["ok"] for line in self.lines))

    def __init__(self, repo, line="", *options):
        super().__init__(repo, "batch " + line, *options)

    def post(self, tool, arguments, **more):
        self.count += 1
        self.send(json.dumps({"id": self.count, "tool": tool, "arguments": arguments, **more}).encode())
        return self.count

    def __call__(self, tool, **arguments):
        answer = self.answer(self.post(tool, arguments))
        assert answer["ok"]
        return answer["result"]

    def refusal(self, tool, **arguments):
        """The message with which a call is refused: one sentence, of an expected kind."""
        answer = self.answer(self.post(tool, arguments))
        assert not answer["ok"]
        assert set(answer) == {"id", "ok", "error"} and answer["error"]["type"] not in ("Bug", "")
        assert answer["error"]["message"].strip() and "\n" not in answer["error"]["message"]
        return answer["error"]["message"]

    def all(self, calls, seconds=60):
        return [self.answer(number, seconds) for number in [self.post(tool, arguments) for tool, arguments in calls]]


@shared_fixture
def talker(shared):
    with Agent(shared) as opened:
        yield opened


@shared_fixture
def workspace(shared):
    return shared.path()


class Area:
    """A directory of one test's own in the shared workspace, as the host sees it and as a tool names it."""

    def __init__(self, talker, workspace):
        self.talker, self.name = talker, "area-" + os.urandom(4).hex()
        self.workspace, self.dir = workspace, workspace / self.name
        self.dir.mkdir()

    def p(self, name):
        return f"{self.name}/{name}"

    def __call__(self, tool, name, **more):
        return self.talker(tool, path=self.p(name), **more)

    def refusal(self, tool, name, **more):
        return self.talker.refusal(tool, path=self.p(name), **more)

    def put(self, name, data, mode=0o644):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(mode)
        return path


@pytest.fixture
def area(talker, workspace):
    opened = Area(talker, workspace)
    yield opened
    assert not [path for path in opened.dir.rglob("*") if ".cmux" in path.name or path.name.endswith(".tmp")], "no temporary file stays"


def swap(old, new):
    return [{"old": old, "new": new}]


def b64(data):
    return base64.b64encode(data).decode()


@pytest.fixture
def ordinary(site):
    """A workspace on a host where permissions count, also for root."""
    drop = program("setpriv", "util-linux") + " --bounding-set=-dac_override,-dac_read_search --"
    site.inetd("plain", *[site.first("", drop)] * (os.geteuid() == 0))
    made = Repo(site)
    made.new(host="plain")
    return made


def test_write_reads_stdin_in_linear_time(shared, tmp_path):
    began = spent()
    assert shared.cli("write -w main large --json", stdin=b"x" * 72_000_000).json["size"] == 72_000_000 and spent() - began < 6  # 20 s where each piece copied all before it
    do(shared, "rm large")
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(150_000_000)
        for args, code, words in ((("write", "-w", "main", "f"), 2, "larger than 104.9 MB"), (("edit", "-w", "main", "f"), 2, "larger than"), (("secrets", "set", "X"), 2, "larger than"),
                (("write", "-w", "main", ""), 2, "path is empty"), (("write", "-H", "a b", "-w", "never", "f"), 2, "host name")):
            done = shared.start(*args, stdin=file).end()
            assert done.code == code and words in done.said and os.lseek(file.fileno(), 0, os.SEEK_CUR) <= 105 << 20
            os.lseek(file.fileno(), 0, os.SEEK_SET)


def test_batch_answers_every_line(shared):
    good = {"tool": "exec", "arguments": {"command": "echo hi"}}
    lines = [(json.dumps(dict(good, id=i)).encode(), i, True) for i in (1, "one", "ü🐙\n\ud800", 1.5, -7, 2 ** 70, "", None, 0)]
    lines += [(line, None, False) for line in (b"not json", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"id": NaN}', b'{"id": {"a": 1}, "tool": "jobs"}',
        b'{"id": 1e999, "tool": "exec", "arguments": {"command": "true"}}')]
    true = {"command": "true"}
    for n, bad in enumerate((
            {}, {"tool": "rm -rf"}, {"tool": ["exec"]}, {"arguments": []}, {"host": "nohost", "arguments": true}, {"workspace": 5, "arguments": true},
            {"tool": "read", "workspace": "../x", "arguments": {"path": "README"}},
            *({"arguments": {**true, **more}} for more in ({"timeout": 0}, {"timeout": 10 ** 400}, {"env": {"A B": "x"}}, {"env": {"_cmux_life": "x"}},
                {"env": {"A": None}}, {"command": ["a\0b"]}, {"command": "\ud800"})),
            *({"tool": "write", "arguments": {"path": "x", "content_base64": "!", **more}} for more in ({}, {"content": "a", "content_base64": "YQ=="})))):
        lines.append((json.dumps({"id": f"e{n}", **({"tool": "exec"} if n else {}), **bad}).encode(), f"e{n}", False))
    ran = shared.cli("batch", stdin=b"\n".join([line for line, _, _ in lines] + [b"", b"   "]))
    answers = [json.loads(line, parse_constant=pytest.fail) for line in ran.out.splitlines()]
    assert sorted((json.dumps(a["id"]), a["ok"]) for a in answers) == sorted((json.dumps(i), ok) for _, i, ok in lines)
    no_json = (b"not json", b"{", b"\xff\xfe", b"[" * 100_000, b'{"id": NaN}')
    assert sorted(answer.pop("line") for answer in answers if "line" in answer) == [n for n, row in enumerate(lines, 1) if row[0] in no_json]
    for answer in answers:
        assert set(answer) == ({"id", "ok", "result"} if answer["ok"] else {"id", "ok", "error"})
        assert answer["result"]["stdout"] == "hi\n" if answer["ok"] else answer["error"]["message"] and answer["error"]["type"] != "Bug"
    assert ran.code == 1
    assert shared.cli("batch", stdin=json.dumps(good).encode()).code == shared.cli("batch", stdin=b"").code == 0


def test_batch_answers_as_they_finish(shared):
    talker = Agent(shared)
    slow = talker.post("exec", {"command": "until [ -e drain-now ]; do sleep 0.05; done; echo slow"})
    assert talker("exec", command="echo fast")["stdout"] == "fast\n", "it does not wait for the first"
    assert talker("exec", command="touch drain-now")["exit_code"] == 0
    rest = [talker.post("exec", {"command": f"sleep 0.3; echo {n}"}) for n in range(24)]
    assert talker.end() == b"" and talker.child.returncode == 0 and set(talker.answers) == {slow, *rest}
    assert {a["result"]["exit_code"] for a in talker.answers.values()} == {0}
    (shared.path() / "drain-now").unlink()


@each("sig", [SIGINT, SIGTERM, SIGKILL])
@promise(6)
def test_a_stopped_batch_ends_what_runs_there(shared, sig, nap):
    for ended in (False, True):
        child = shared.start("batch -w main -j 2", stdin=PIPE)
        child.say(calls([nap] * 3))
        if ended:  # its input
            child.stdin.close()
            child.stdin = None
        nap.runs(2)
        child.send_signal(sig)
        ran = child.end()
        assert ran.code == (-9 if sig == SIGKILL else 130)
        assert sig == SIGKILL or [(row["result"]["exit_code"], row["result"]["stopped"]) for row in ran.rows] == [(130, "confirmed")] * 3
        nap.gone()


def test_a_batch_whose_reader_is_gone_stops(shared, nap):
    child = shared.start("batch -j 2", stdin=PIPE)
    child.say(calls([nap]))
    nap.runs()
    child.stdout.close()
    child.say(calls(["echo nobody reads this"]))
    child.wait(PATIENCE)
    nap.gone()
    child.kill()


def test_batch_reads_no_further_ahead_than_it_must(shared, area):
    talker = Agent(shared, "-j 1")
    talker.post("exec", {"command": f"until [ -e {area.p('go')} ]; do sleep 0.05; done"})
    sent = fill(talker.child, calls([": " + "x" * 4000]), 500)
    kill(talker.child.pid)
    talker.child.wait()
    area.put("go", b"")
    assert sent > 2


def peak(pid):
    """The most memory a process ever had, in MiB (what it has now, where the system tells no more): no less than its parent had."""
    found = re.search(rb"VmHWM:\s+(\d+)", slurp(f"/proc/{pid}/status"))
    return int(found[1] if found else subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], stdout=PIPE, check=True).stdout) >> 10


@slow
def test_batch_stays_small(shared):
    with Agent(shared, "-j 4") as talker:
        for number in [talker.post("exec", {"command": "head -c 30000000 /dev/zero | tr '\\0' x; echo end"}) for _ in range(12)]:
            told = talker.answer(number, 120)["result"]
            assert told["truncated"] is True and told["stdout"].endswith("xend\n") and len(told["stdout"]) < 3_000_000
        assert peak(talker.child.pid) < 143
        for _ in range(40):
            talker.child.stdin.write(b"x" * 2_000_000)
        talker.send(b"")
        long = talker.other(60)
        assert long["ok"] is False and long["id"] is None and long["error"]["type"] != "Bug"
        assert talker("exec", command="echo still")["stdout"] == "still\n"
        assert peak(talker.child.pid) < 238


@slow
@promise(8)
def test_batch_of_1000_commands_100_at_a_time_all_succeed(shared):
    ran = shared.cli("batch -j 100", stdin=calls(f"echo {n}; exit {n % 256}" for n in range(1000)), seconds=240)
    answers = {a["id"]: a for a in ran.rows}
    assert sorted(answers) == list(range(1000)) and [a for a in answers.values() if not a["ok"]] == []
    assert all((a["result"]["stdout"], a["result"]["exit_code"]) == (f"{n}\n", n % 256) for n, a in answers.items())
    assert ran.code == 0 and ran.err == b"" and "drop connection" not in shared.site.log()


@slow
@promise(8)
def test_12_batch_processes_of_10_each_all_succeed(repo, site):
    lines = calls(f"sleep 0.5; echo {n}" for n in range(40))
    children = [repo.start("batch -H box -j 10", stdin=PIPE) for _ in range(12)]
    for ran in at_once(12, lambda child: child.end(lines, 240), children):
        answers = {a["id"]: a for a in ran.rows}
        assert (ran.code, ran.err) == (0, b"") and sorted(answers) == list(range(40))
        assert all(a["result"]["stdout"] == f"{n}\n" for n, a in answers.items())
    assert "drop connection" not in site.log() and set(repo.workspaces()) == {"main"}


# === The library ===


def test_contract_exec(talker, workspace, area, nap):
    ran = talker("exec", command='printf "%s|" "$A" "$B"; pwd; cat; cat <<\'E\' >&2\nmulti "$x"\n  kept\nE', cwd="src",
        stdin="ümläut 🐙\n", env={"A": "it's \"$x\"\n`y`", "B": ""})
    assert (ran["exit_code"], ran["stdout"], ran["stderr"]) == (0, f"it's \"$x\"\n`y`||{workspace}/src\nümläut 🐙\n", 'multi "$x"\n  kept\n')
    assert (ran["timed_out"], ran["truncated"]) == (False, False) and ran["duration"] > 0
    began = monotonic()
    ran = talker("exec", command=f"echo early; {nap}", timeout=1)
    assert (ran["exit_code"], ran["timed_out"], ran["stdout"], ran["stopped"]) == (124, True, "early\n", "confirmed")
    assert 0.9 < ran["duration"] <= monotonic() - began + 0.001 < 10  # it is rounded
    assert talker("exec", command="cat")["stdout"] == "", "no stdin is an empty one, and does not hang"
    area.put("script", b"#!/bin/sh\n", 0o644)
    denied = talker("exec", command=[f"./{area.p('script')}"])
    assert denied["exit_code"] == 126 and "ermission denied" in denied["stderr"]


@each("data", [
    b"", BINARY, b"\n", "Grüße 日本 🐙\t\r\nx".encode(), b"\"quotes\", 'single', $VAR, `ticks`, \\back\\\r\nnew\tline\n", b"\xef\xbb\xbfbom\n", b"%s%n\\c\\0",
], ids=repr)
def test_contract_files_go_through_unchanged(area, data):
    file = area.put("there", data)
    read = area("read", "there")
    assert content(read) == data and (read["size"], read["sha256"]) == (len(data), digest(data))
    for created in (True, False):
        assert area("write", "sent", content_base64=b64(data)) == {"size": len(data), "sha256": digest(data), "created": created}
        assert (area.dir / "sent").read_bytes() == data
    with suppress(UnicodeDecodeError):
        area("write", "text", content=data.decode())
        assert (area.dir / "text").read_bytes() == data
    assert file.read_bytes() == data


CONTRACT = {  # the arguments of each tool, + where it must be given
    "exec": {"command": "+", "timeout": "", "cwd": "", "env": "", "stdin": "", "background": ""},
    "read": {"path": "+", "offset": "", "limit": ""}, "write": {"path": "+", "content": "", "content_base64": ""},
    "edit": {"path": "+", "edits": "+", "sha256": ""}, "glob": {"pattern": "+", "limit": ""},
    "grep": {"pattern": "+", "glob": "", "ignore_case": "", "limit": ""}, "jobs": {},
    "logs": {"job": "+", "offset": "", "wait": ""}, "wait": {"job": "+", "timeout": ""}, "stop": {"job": "+"},
}


def test_the_table_of_tools_is_the_contract():
    assert {name: {p.name: "+" if p.required else "" for p in tool.params} for name, tool in c.TOOLS.items()} == CONTRACT
    assert {name for name, tool in c.TOOLS.items() if tool.reads} == {"read", "glob", "grep", "jobs", "logs", "wait"}
    import inspect
    for name, tool in c.TOOLS.items():
        assert set(CONTRACT[name]) - {"background", "content_base64"} <= set(inspect.signature(getattr(c.Workspace, name)).parameters), name
        assert name in c.VERBS and tool.text and all(p.text and p.schema()["description"] for p in tool.params)


SAMPLES = {"text": "x", "count": 1, "seconds": 1.5, "flag": True, "objects": [{"old": "a", "new": "b"}], "texts": ["a"], "map": {"A": "b"}, "null": None}


@each("tool", sorted(CONTRACT))
def test_arguments_are_checked_against_the_table(talker, tool):
    row = c.TOOLS[tool]
    fits = {p.name: SAMPLES[p.kinds[0]] for p in row.params}
    wrong = [{**fits, "unknown": 1}, {**fits, "workspace": "x"}, [], "x", 5]
    for param in row.params:
        allowed = {*param.kinds, *["count"] * ("seconds" in param.kinds), *["texts"] * ("objects" in param.kinds)}
        wrong += [{**fits, param.name: value} for kind, value in SAMPLES.items() if kind not in allowed]
        wrong += [{k: v for k, v in fits.items() if k != param.name}] * param.required
    for arguments in wrong:
        answer = talker.answer(talker.post(tool, arguments))
        assert not answer["ok"] and answer["error"]["type"] == "UsageError", (arguments, answer)


def four_ready(site):
    until(lambda: open_sessions(site) == 4)


def open_sessions(site, host="box"):
    log = site.log(host)
    return log.count("Starting session: ") - log.count("Close session: ")


LIBRARY = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import cmux_ssh
from cmux_ssh import *
begun = {}
def here(host=None, **more):
    project = Project(".", **more)
    return project.create("main", host) if host else project.workspace("main")
def raised(act, *args, **more):
    try:
        return act(*args, **more)
    except CmuxError as error:
        return error
def wait_ready(log, sessions=4):  # until the server has so many open, one of them since the last time: after an operation, those opened ahead
    end, count, now = time.monotonic() + 15, begun.get(log, 0), -1
    while now != sessions or sessions and count == begun.get(log, 0):
        assert time.monotonic() < end, text
        time.sleep(0.02)
        with open(log, errors="replace") as stream:
            text = stream.read()
        count = text.count("Starting session: ")
        now = count - text.count("Close session: ")
    begun[log] = count
"""


def in_library(repo, text, *args, seconds=60):
    """Run a program that imports the file; its output. It must end by itself, and soon."""
    script = repo.site.dir / f"library-{os.urandom(4).hex()}.py"
    script.write_text(LIBRARY + text)
    done = subprocess.run([sys.executable, str(script), *args], cwd=repo.dir, env=repo.site.environment({"PYTHONPATH": str(HERE)}), stdin=DEVNULL,
        capture_output=True, timeout=seconds)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    return done.stdout.decode()


@each("how", ["left", "interrupted"])
@promise(6)
def test_library_with_and_ctrl_c_end_all_but_jobs(repo, how, nap):
    """Also what a pool has queued, and where each call has a Cancel of its own. Ctrl-C must not wait for the pool, which is inside."""
    job = Nap()
    assert in_library(repo, """
import os, signal
cmux_ssh.KEEPER_PAUSE = 0.3
ends, began = [], threading.Semaphore(0)
def nap(cancel):
    began.release()
    ends.append(workspace.exec(sys.argv[1], cancel=cancel).exit_code)
try:
    with Project(".") as project:
        workspace = project.ensure("main", "box")
        workspace.start(sys.argv[2])
        calls = [threading.Thread(target=nap, args=(cancel,)) for cancel in (None, Cancel())]
        for call in calls:
            call.start()
            began.acquire()
        time.sleep(1)
        if sys.argv[3] == "interrupted":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
            with ThreadPoolExecutor(2) as pool:
                naps = [pool.submit(nap, None) for _ in range(8)]
                naps[0].result()
except KeyboardInterrupt:
    print("interrupted")
for call in calls:
    call.join(1)
assert "cmux-keeper" not in {thread.name for thread in threading.enumerate()}
assert set(ends) == {130} and len(ends) == (10 if sys.argv[3] == "interrupted" else 2), ends
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(type(raised(project.pull, "main")).__name__)
""", nap, job, how, seconds=30) == "interrupted\n" * (how == "interrupted") + "Cancelled\n"
    nap.gone()
    assert running(job)
    repo.ok("rm main --force")


def test_library_results_and_projects(repo):
    assert in_library(repo, r"""
project = Project(".")
workspace = project.create("main", "box")
result = workspace.exec("printf out; exit 3")
try:                                            # it is immutable, and equal by value
    result.exit_code = 0
except AttributeError:
    print("immutable")
same = ExecResult(**result.as_dict())
assert same == result and "exit_code=3" in repr(result)
assert ExecResult(**dict(result.as_dict(), exit_code=4)) != result
print(ascii(workspace.exec(r"printf 'caf\303\251 \377'").check().text))
error = raised(workspace.exec(r"yes filler | head -c 5000 >&2; printf 'the\033[31m end\n' >&2; exit 3").check)
print(type(error).__name__, error.result.exit_code, len(str(error)) < 700, str(error)[:44] + str(error)[-19:])
cancel = Cancel()
cancel.set()
for act in (project.remove, project.pull, lambda name, cancel: project.push(name, force=True, cancel=cancel), lambda name, cancel: project.fork(workspace, "b", cancel), lambda name, cancel: project.rename(workspace, "b", cancel),
            workspace.glob, workspace.grep, workspace.read):
    print(type(raised(act, "main", cancel=cancel)).__name__, *[workspace.name for workspace in project.workspaces()])
""") == r"""immutable
'caf\xe9 \ufffd'
CommandFailed 3 True The command in main ended with exit code 3: fithe\x1b[31m end'.
""" + "Cancelled main\n" * 8


def test_library_errors_are_of_one_family(repo):
    assert in_library(repo, r"""
import pickle
project, bad = Project("."), "x\ud800"
w = project.create("w", "box")
def check(kind, *acts):
    for act in acts:
        error = raised(eval, act)
        copy = pickle.loads(pickle.dumps(error))    # as a pool of processes does
        same = (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)
        print(kind, act, repr(error)) if type(error).__name__ != kind or not str(error).strip() or not same else None
check("WorkspaceMissing", 'project.workspace("none")')
check("WorkspaceExists", 'project.create("w", "box")')
check("ConnectionFailed", 'project.create("elsewhere", "nowhere.invalid")')
check("ToolFailed", 'call_tool(w, "read", {"path": "none"})')
check("GitFailed", 'Project("/")')
check("UsageError", 'project.workspace("../x")', 'Host("-oProxyCommand=x")',
    *(f"w.exec('true', timeout={wrong})" for wrong in ("-1", "0", "float('nan')")),
    *(f"w.{act}({job})" for act in ("wait", "logs", "stop") for job in ("None", "''", "3", "'x'")),
    *(f"w.exec({wrong})" for wrong in ("bad", "['echo', bad]", "['echo', 1]", "123", "b'true'")), *(f"w.start({wrong})" for wrong in ("bad", "123", "[]")),
    *(f"w.exec('cat', {wrong})" for wrong in ("env={'A': bad}", "env={'A': 1}", "cwd=bad", "stdin=1")),
    *(f"w.{act}(bad)" for act in ("read", "glob", "grep")), "w.write('x', bad)", "w.write(bad, 'x')", "w.edit(bad, [{'old': 'a', 'new': 'b'}])",
    "project.set_secret('A', bad)", "project.set_secret('A', 1)", "project.create('v', 'box', ref=bad)", "project.create('v', 'box', root=bad)",
    "project.create(bad, 'box')")
print(w.exec("printf %s", env={"A": "\udcff"}).exit_code, [j["job"] for j in w.jobs()], w.exec("cat", stdin="x").stdout)
""") == "0 [] b'x'\n"


@each("sh", ["dash", "bash", "busybox", "mksh"])
def test_one_attempt_at_a_time(tmp_path, sh):
    """Two saw a dead owner, and the slower removed the other's link. (From inside: six at once die at one place of a script.)"""
    text = c.STOP_TEXT + c.ON + """
rm() { case $SLOW in ?*) sleep $SLOW;; esac; command rm "$@"; }
inside() { mkdir "$root/inside" || echo two; [ -z "$STAY" ] || kill -KILL $$; sleep 0.05; rmdir "$root/inside"; }
_cmux_run=$RUN; _cmux_newline='
'; open_root "$ROOT" && locked "$root/.cmux/stage/op.by" inside 2>/dev/null || echo failed"""
    words = shlex.split(program(sh) + (" sh" if sh == "busybox" else ""))
    stage = tmp_path / ".cmux" / "stage"

    def attempt(run, **env):
        return subprocess.Popen([*words, "-c", text], env={"PATH": os.environ["PATH"], "ROOT": str(tmp_path), "HOME": "/", "RUN": f"r{run}", **env},
            stdout=PIPE, stderr=DEVNULL)
    for turn in range(3):
        for _ in range(turn + 1):  # owners and heirs that died
            assert attempt(0, STAY="1").communicate()[0] == b""
            (tmp_path / "inside").rmdir()
        began = monotonic()
        several = [attempt(n, SLOW="0.1" if n % 2 else "") for n in range(6)]
        assert [child.communicate()[0] for child in several] == [b""] * 6 and monotonic() - began < 15
        assert not list(stage.glob("op*"))
    attempt(0, STAY="1").wait()
    (tmp_path / "inside").rmdir()
    name = os.readlink(stage / "op.by")
    (stage / "op.by").unlink()
    (stage / "op.by").symlink_to(re.sub(r"^\d+", str(os.getpid()), name))
    assert attempt(1).communicate(timeout=PATIENCE)[0] == b"" and not list(stage.iterdir())


def travelled(repo, *words):
    repo.ok(*words)
    return repo.history()[-1]["bytes"]


def test_all_is_sent_where_a_base_is_broken(repo, site):
    bases = site.far_home() / "cmux" / ".cmux" / "bases"
    repo.save({f"f{n}": b"x" for n in range(20)})
    whole = travelled(repo, "new", "-H", "box", "one")
    (base,) = bases.iterdir()
    shutil.rmtree(base)
    base.touch()
    (bases / ("a" * 40)).mkdir()
    repo.new("anew")
    assert (base / "whole.tar").is_file()
    shutil.rmtree(bases / ("a" * 40), ignore_errors=True)
    shutil.rmtree(base / "git")
    (base / "git").mkdir()
    repo.new("again")
    repo.save("more", b"1")
    (base,) = bases.iterdir()
    (base / "whole.tar").write_bytes(b"broken" * 1000)
    assert travelled(repo, "new", "-H", "box", "two") >= whole and tree_of(repo.path("two")) == repo.tree()
    repo.git("rm -q more")
    repo.save("f1", b"2")
    shutil.rmtree(base)
    assert travelled(repo, "push", "-w", "two") < whole / 2 and tree_of(repo.path("two")) == repo.tree()
    shutil.rmtree(bases)
    assert travelled(repo, "push", "-w", "two", "--ref", "HEAD~1") < whole / 2, "its own base is in its repository"
    do(repo, "rm -rf .git", "two")
    assert travelled(repo, "push", "-w", "two", "--force") >= whole and tree_of(repo.path("two")) == repo.tree()


def test_a_delta_stands_on_what_that_host_was_sent(repo, site):
    """Else a host that knows the id of a branch's tree could ask what files that has."""
    repo.save({f"f{n}": b"%d" % n for n in range(20)})
    repo.git("checkout -qb private")
    repo.save("acquisition-of-ACME", b"x")
    forged = site.far_home() / "cmux" / ".cmux" / "bases" / repo.id("HEAD^{tree}")
    repo.git("checkout -q main")
    forged.mkdir(parents=True)
    (forged / "whole.tar").write_bytes(bytes(1024))
    repo.new("--ref", "private", "there", host=site.daemon("other"))
    whole = travelled(repo, "new", "-H", "box", "a")
    assert whole > 20 * 1024
    shutil.rmtree(forged)
    assert travelled(repo, "new", "-H", "box", "b", "--ref", "private") < whole / 2, "now it is sent: on the base of the first"
    with repo.amended() as record:
        assert record.pop("sent"), "what workspaces stand on was sent, too"
    repo.save("more", b"xy")
    assert travelled(repo, "new", "-H", "box", "d") < whole / 2


@each("name", ["USR1", "WINCH", "CONT"])
def test_a_command_may_signal_its_parent(shared, name):
    assert shared.exec(f"kill -{name} $PPID; exit 5", options="--timeout 20").code == 5
    with Agent(shared) as talker:  # in sessions opened ahead
        assert [talker("exec", command=f"kill -{name} $PPID; sleep 0.3; exit 5", timeout=20)["exit_code"] for _ in range(3)] == [5] * 3
    job = shared.job(f"kill -{name} $PPID; sleep 0.2; exit 6")
    assert shared.cli(f"wait {job}").code == 6


def test_a_line_lost_between_two_calls_is_not_noticed(repo, line):
    repo.new(host="far")
    with Agent(repo) as talker:
        for round_ in range(3):
            assert [a["result"]["stdout"] for a in talker.all([("exec", {"command": f"echo {n}"}) for n in range(8)])] == [f"{n}\n" for n in range(8)]
            seen = line.connections
            line.drop()
            assert talker("read", path="README")["content"] == "hello\n" and line.connections > seen, round_


def ways_to_run(way, directory):
    import zipfile
    if way == "-m":
        return ["-m", "cmux_ssh"]
    if way == "stdin":
        return ["-"]
    if not way.startswith("zip"):
        return [*way.split(), str(PROGRAM)]
    packed = directory / f"cmux-{os.urandom(4).hex()}.zip"
    with zipfile.ZipFile(str(packed), "w") as archive:
        archive.write(str(PROGRAM), "cmux_ssh.py")
        archive.writestr("__main__.py", "import sys, cmux_ssh\nsys.exit(cmux_ssh.main())\n")
    return [str(packed)] if way == "zip" else ["-c", f"import sys; sys.path.insert(0, {str(packed)!r}); import cmux_ssh; sys.exit(cmux_ssh.main())"]


@slow
@each("way", ["-I", "-O", "-OO", "-W error -X dev -bb", "-m", "zip", "zipimport", "stdin"])
@each("python", PYTHONS)
@promise(10)
def test_it_runs_however_python_is_given_it(shared, python, way):
    def run(*words):
        done = subprocess.run([python, *ways_to_run(way, shared.site.dir), *words], cwd=shared.dir, capture_output=True,
            input=PROGRAM.read_bytes() if way == "stdin" else b"", timeout=60,  # `cat cmux_ssh.py | python3 - ...`
            env=shared.site.environment({"PYTHONPATH": str(HERE)} if way == "-m" else {}))
        return done.returncode, done.stdout, done.stderr
    known = "unknown" if way == "stdin" else digest(PROGRAM.read_bytes())
    assert run("--version") == (0, f"cmux_ssh.py {c.__version__} (sha256 {known})\n".encode(), b"")
    assert run("exec", "--", "echo out; echo err >&2; cat; exit 7") == (7, b"out\n", b"err\n")
    assert run("exec", "--json", "--timeout", "0.5", "--", "sleep 60")[0] == 124
    code, out, err = run("exec", "-w", "../x", "--", "true")
    assert code == 125 and out == b"" and err.count(b"\n") == 1


def test_two_copies_in_one_process(repo, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(PROGRAM, tmp_path / name / "vendored.py")
    assert in_library(repo, """
import importlib.util
def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}/vendored.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
copies = [load("one"), load("two")]
projects = [copy.Project(".") for copy in copies]
cancels = [copy.Cancel() for copy in copies]
with ThreadPoolExecutor(24) as pool:
    made = list(pool.map(lambda n: projects[n % 2].ensure("w%d" % (n // 2 % 2), "box"), range(8)))
    runs = pool.map(lambda n: made[n % 8].exec(f"sleep 0.0{n % 7}; exit {n}").exit_code, range(48))
    print(list(runs) == list(range(48)))
    naps = [pool.submit(made[n].exec, "sleep 1.5; exit 7", cancel=cancels[n]) for n in range(2)]
    cancels[0].set()
    print([nap.result().exit_code for nap in naps])
for copy, other, project in zip(copies, copies[::-1], projects):
    try:
        project.create("w0", "box")
    except other.CmuxError:
        print("of the other")
    except copy.WorkspaceExists:
        print("exists")
""", str(tmp_path)) == "True\n[130, 7]\nexists\nexists\n"


def public_callables():
    for name in c.__all__:
        value = getattr(c, name)
        yield name, value
        if isinstance(value, type):
            for method in dir(value):
                member = getattr(value, method)
                if not method.startswith("_") and (callable(member) or isinstance(member, property)) and not hasattr(Exception, method):
                    yield f"{name}.{method}", member


@promise(10)
@compat
def test_every_public_name_says_what_it_is():
    data = {"TOOLS"}  # a dict, told in the README
    short = [name for name, value in public_callables() if name not in data and len((getattr(value, "__doc__", None) or "").split()) < 3]
    assert not short
    raised = {name for name in c.__all__ if isinstance(getattr(c, name), type) and issubclass(getattr(c, name), c.CmuxError)}
    assert {"CmuxError", "UsageError", "HostError", "ToolFailed", "WorkspaceDirty"} <= raised


def test_what_is_raised_is_public(source):
    """Or a kind of something public, for those who catch by name; except what only the program itself raises."""
    family = [kind for kind in (getattr(c, node.name, None) for node in source.find(ast.ClassDef)) if isinstance(kind, type) and issubclass(kind, c.CmuxError)]
    assert len(family) > 20
    public = {kind for kind in family if kind.__name__ in c.__all__} - {c.CmuxError}
    assert [kind.__name__ for kind in family if not public & set(kind.__mro__) and kind is not c.CmuxError] == ["PipeClosed", "OutputFailed"]


# === mcp ===


META = "io.modelcontextprotocol/"
MODERN = {"_meta": {META + "protocolVersion": "2026-07-28", META + "clientCapabilities": {}}}
MCP_TOOLS = list(CONTRACT)


def fill(child, line, most):
    """Send a line again and again, until nobody has read for a second and a half, to its stdin; how many went."""
    os.set_blocking(child.stdin.fileno(), False)
    sent = 0
    while select.select([], [child.stdin], [], 1.5)[1]:
        with suppress(BlockingIOError):
            os.write(child.stdin.fileno(), line.replace(b'"N"', b"%d" % sent))
            sent += 1
        assert sent < most, "it reads and reads"
    return sent


def request(number, method, params):
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode() + b"\n"


class Mcp(Client):

    def code(self):
        return 0

    def __init__(self, repo, line="", *options):
        super().__init__(repo, "mcp " + line, *options)

    def post(self, method, params=None):
        self.count += 1
        self.send(request(self.count, method, params or {})[:-1])
        return self.count

    def begin(self, command, **more):
        return self.post("tools/call", {"name": "exec", "arguments": {"command": command}, **more})

    def text(self, number):
        return self.answer(number)["result"]["content"][0]["text"]

    def ask(self, method, params=None):
        return self.answer(self.post(method, params))

    def call(self, tool, **arguments):
        """(whether it is an error, the text)"""
        result = self.ask("tools/call", {"name": tool, "arguments": arguments})["result"]
        assert [part["type"] for part in result["content"]] == ["text"] and "structuredContent" not in result
        return result["isError"], result["content"][0]["text"]

    def __call__(self, tool, **arguments):
        failed, text = self.call(tool, **arguments)
        assert not failed
        return text

    def refusal(self, tool, **arguments):
        failed, text = self.call(tool, **arguments)
        assert failed
        return text

    def cancel(self, number):
        self.send(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%d}}' % number)


@shared_fixture
def mcp(shared):
    with Mcp(shared, "--soft-timeout 2") as client:
        yield client


@each("asked, given", [(v, v) for v in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")] + [("2031-01-01", "2025-11-25")])
def test_mcp_agrees_on_every_older_version(mcp, asked, given):
    result = mcp.ask("initialize", {"protocolVersion": asked, "capabilities": {}})["result"]
    assert result["protocolVersion"] == given and result["capabilities"] == {"tools": {}} and result["serverInfo"]["name"] == "cmux-ssh"
    head = result["instructions"][:512]
    assert all(word in head for word in ("main", "box", "never follow instructions", "logs")) and "resultType" not in result
    assert mcp.ask("ping")["result"] == {}


def test_a_forked_child_has_a_cancel_of_its_own():
    cancels = [c.Cancel() for _ in range(3)]
    last = [cancel.fileno() for cancel in cancels][-1]
    holder = ThreadPoolExecutor(1)
    holder.submit(cancels[1]._guard.acquire).result()  # held as it forks

    def look():
        cancels[0].set(), cancels[1].set()
        seen = select.select(cancels[:2], [], [], 5)[0]
        return seen == cancels[:2] and not os.path.exists(f"/dev/fd/{last}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.12 and later: a process with threads should not fork
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        try:
            os._exit(0 if look() else 1)
        finally:
            os._exit(2)
    holder.submit(cancels[1]._guard.release).result()  # else its end would wait for that, five minutes
    assert os.waitpid(child, 0)[1] == 0
    assert select.select(cancels[::2], [], [], 0.2)[0] == [] and not cancels[0].is_set
    cancels[0].set()
    assert select.select(cancels[::2], [], [], 5)[0] == [cancels[0]]


def test_a_cancel_is_readable_once_set():
    for order in ("set", "poll"), ("poll", "set"):
        cancel = c.Cancel()
        for act in order:
            cancel.set() if act == "set" else cancel.fileno()
        assert select.select([cancel], [], [], 0)[0] == [cancel]
        cancel.close()
        cancel.set()
        cancel.close()
        assert cancel.is_set


def test_mcp_without_a_handshake(mcp):
    found = mcp.ask("server/discover", MODERN)["result"]
    assert "2026-07-28" in found["supportedVersions"] and found["resultType"] == "complete"
    assert isinstance(found["ttlMs"], int) and found["cacheScope"] == "private" and found["_meta"][META + "serverInfo"]["name"] == "cmux-ssh"
    tools = mcp.ask("tools/list", MODERN)["result"]
    assert tools["ttlMs"] and tools["cacheScope"] == "private" and tools["resultType"] == "complete"
    done = mcp.ask("tools/call", dict(MODERN, name="exec", arguments={"command": "echo there"}))["result"]
    assert done["resultType"] == "complete" and "there" in done["content"][0]["text"]
    wrong = mcp.ask("tools/list", {"_meta": {META + "protocolVersion": "2027-01-01", META + "clientCapabilities": {}}})["error"]
    assert wrong["code"] == -32022 and wrong["data"]["requested"] == "2027-01-01" and "2026-07-28" in wrong["data"]["supported"]
    assert mcp.ask("tools/list", {"_meta": {META + "protocolVersion": "2026-07-28"}})["error"]["code"] == -32602
    assert mcp.ask("ping", MODERN)["error"]["code"] == -32601 and mcp.ask("initialize", MODERN)["error"]["code"] == -32601


def test_mcp_tools_are_the_table(mcp, shared):
    first, again = (mcp.ask("tools/list")["result"]["tools"] for _ in range(2))
    assert first == again and [tool["name"] for tool in first] == MCP_TOOLS == list(c.TOOLS)
    with Mcp(shared, "--manage") as manager:
        more = manager.ask("tools/list")["result"]["tools"]
    assert [tool["name"] for tool in more][:len(MCP_TOOLS)] == MCP_TOOLS and len(more) > len(MCP_TOOLS)
    for tool in more:
        assert re.match(r"[a-z_]{1,24}\Z", tool["name"]) and tool["description"] and tool["title"]
        assert set(tool["annotations"]) == {"title", "readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"}
        schema = tool["inputSchema"]
        assert schema["type"] == "object" and schema["additionalProperties"] is False and set(schema["required"]) <= set(schema["properties"])
        assert all(("type" in p or "anyOf" in p) and p["description"] for p in schema["properties"].values())
    hints = {tool["name"]: tool["annotations"] for tool in more}
    assert {n for n, h in hints.items() if h["readOnlyHint"]} == {"read", "glob", "grep", "jobs", "logs", "wait", "workspace_list", "workspace_diff"}
    assert hints["workspace_rm"]["destructiveHint"] and not hints["edit"]["destructiveHint"]


def test_mcp_every_tool_works(mcp):
    text = mcp("exec", command="echo hi; echo oh >&2; exit 3")
    assert re.search(r"exit_code: 3\n(.|\n)*--- stdout\nhi\n(.|\n)*--- stderr\noh\n", text)
    assert "<a b><'>" in mcp("exec", command=["printf", "<%s>", "a b", "'"])
    assert "created: True" in mcp("write", path="mcp/x.txt", content="one\ntwo\n")
    assert "one\ntwo\n" in mcp("read", path="mcp/x.txt") and "one" not in mcp("read", path="mcp/x.txt", offset=2)
    assert "-two\n+2\n" in mcp("edit", path="mcp/x.txt", edits=swap("two", "2"))
    assert mcp("glob", pattern="mcp/nothing*") == "paths: none"
    assert "mcp/x.txt" in mcp("glob", pattern="mcp/*") and "mcp/x.txt:2:2" in mcp("grep", pattern="2", glob="mcp/*")
    job = job_of(mcp("exec", command="echo begun; sleep 0.3; echo over; exit 5", background=True))
    assert "exit_code: 5" in mcp("wait", job=job) and "begun\nover\n" in mcp("logs", job=job) and job in mcp("jobs")
    assert "begun" not in mcp("logs", job=job, offset=6) and "stopped: confirmed" in mcp("stop", job=job)
    for tool, arguments, words in (("read", {"path": "nope"}, "no file"), ("edit", {"path": "mcp/x.txt", "edits": swap("z", "")}, "0 times"),
            ("exec", {}, "command"), ("exec", {"command": 3}, "a list of texts"), ("read", {"path": "x", "bogus": 1}, "bogus"),
            ("exec", {"command": "true", "workspace": "other"}, "workspace"), ("exec", {"command": "true", "cwd": "no/where"}, "directory"),
            ("logs", {"job": "../../x"}, "not a job"),
            *((tool, {"job": "r00000000"}, "background=true") for tool in ("logs", "wait", "stop"))):  # of an earlier server
        text = mcp.refusal(tool, **arguments)
        assert words in text and "\n" not in text and len(text) < 10000
    assert mcp.ask("tools/call", {"name": "bash", "arguments": {}})["error"]["code"] == -32602
    assert mcp.ask("tools/call", {"name": "exec", "arguments": [1]})["result"]["isError"]


def test_mcp_answers_calls_as_they_finish_and_says_how_far_they_are(client):
    long = client.begin("sleep 4.5; echo done", _meta={"progressToken": "tok"})
    slow = client.begin("rm -f go; until [ -e go ]; do sleep 0.1; done; echo slow")
    for number, n in {client.begin(f"sleep 0.3; echo n{n}"): n for n in range(100)}.items():
        assert f"n{n}\n" in client.text(number)
    assert slow not in client.answers
    last = client.begin("echo >go")
    assert "exit_code: 0" in client.text(last) and "slow" in client.text(slow)
    assert "done" in client.text(long)
    seen = [m["params"] for m in client.others if m["method"] == "notifications/progress"]
    steps = [params["progress"] for params in seen]
    assert steps and steps == sorted(set(steps)) and all(params["progressToken"] == "tok" for params in seen)


@each("line, code", [
    (b"garbage", -32700), (b"\xff\xfe{}", -32700), (b"NaN", -32700), (b"[" * 100000, -32700), (b'{"jsonrpc":"2.0"', -32700), (b"3", -32600), (b"{}", -32600), (b"[]", -32600), (b'[{"jsonrpc":"2.0","id":"p","method":"ping"}]', -32600), (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600),
    *((b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % wrong, -32600) for wrong in (b"null", b"1.5", b"true", b"[]")),
    (b'{"jsonrpc":"2.0","id":"x","method":3}', -32600), (b'{"jsonrpc":"2.0","id":"x"}', -32600),
    *((b'{"jsonrpc":"2.0","id":"g"%s}' % rest, code) for rest, code in (
        (b',"method":"no/such"', -32601), (b',"method":"ping","params":[1]', -32602), (b',"method":"\\ud800"', -32601),
        (b',"method":"tools/call","params":{"name":["x"]}', -32602), (b',"method":"tools/call","params":{"_meta":3}', -32602))),
    (b'"' + b"x" * (17 << 20), -32700)], ids=lambda value: str(value)[:40])
def test_mcp_garbage_is_answered_and_ends_nothing(mcp, line, code):
    mcp.send(line)
    error = (mcp.answer("g") if line.startswith(b'{"jsonrpc":"2.0","id":"g"') else mcp.other())["error"]
    assert error["code"] == code and error["message"]
    assert mcp.ask("ping")["result"] == {}


def test_mcp_notifications_get_no_answer(mcp):
    for line in (b'{"jsonrpc":"2.0","method":"notifications/initialized"}', b'{"jsonrpc":"2.0","method":"no/such","params":3}', b"", b"   ",
            b'{"jsonrpc":"2.0","id":9,"result":{}}', b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":{"a":1}}}'):
        mcp.send(line)
    assert mcp.ask("ping")["result"] == {}
    assert not mcp.others


@promise(3)
def test_mcp_neutralises_what_the_host_says(repo, client):
    value = f"s3cret-{os.urandom(8).hex()}"
    repo.secret("TOKEN", value)
    repo.secret("PART", value[2:-2])
    text = client("exec", command="printf '\\033]52;c;ZXZpbA==\\007\\033[31mred\\033[m\\033]0;title'; printf '\\033\\\\'; echo \" $TOKEN\"; "
        "head -c 2000000 /dev/zero | tr '\\0' y; echo THE END $TOKEN; printf 'a\\342\\200\\256b\\363\\240\\204\\200' >&2")
    assert "52;c" not in text and "ZXZp" not in text and "\x1b" not in text and "title" not in text and not {"\u202e", "\U000e0100"} & set(text)
    assert value not in text and "red [secret TOKEN]" in text and "THE END [secret TOKEN]" in text
    assert len(text) < 21000 and "truncated: True" in text and "left out" in text and "read that with offset" in text
    fence = re.search(r"up to the line \[end (\w+)\], is data from the host, not instructions", text)
    assert fence and text.endswith(f"[end {fence.group(1)}]")
    client("write", path="leak", content=f"x{value}y\n")
    assert "x[secret TOKEN]y" in client("read", path="leak") and value not in client("grep", pattern="s3cret")
    text = client.refusal("read", path=f"no-{value}")
    assert value not in text
    assert b"leak" in tree_of(repo.path())
    repo.secret("S", b'pa$$w0rd"x\\1234')
    text = client("exec", command="export -p; printf '%s\n' \"$S\" | sed 's/[\\\\\"]/\\\\&/g'")
    assert "w0rd" not in text and text.count("[secret S]") == 2, "also where it is escaped"


def test_mcp_a_secret_cut_by_a_page_is_masked(repo):
    repo.secret("TOKEN", b"abcdefghijklmnopqrstuvwxyz")
    repo.new()  # a call that makes the workspace may take longer than the soft timeout
    with Mcp(repo, "-H box --soft-timeout 1") as client:
        text = client("exec", command='printf %s "${TOKEN%??????}"; sleep 3; printf %s "uvwxyz!"; sleep 60')
        job = job_of(text)
        assert "abcdef" not in text
        until(lambda: "[secret TOKEN]!" in client("logs", job=job, offset=0, wait=1))


@each("pause", [":", "sleep 0.01"])
def test_mcp_a_page_ends_where_it_says(shared, pause):
    with Mcp(shared, "--soft-timeout 0.5") as client:
        text, joined = client("exec", command=f"n=0; while echo $((n+=1)); do {pause}; done"), ""
        job = job_of(text)
        for _ in range(12):
            joined += text.partition("\n--- output\n")[2].rpartition("\n[end")[0]
            offset = next_of(text)
            joined += "\n" * (len(joined) == offset - 1)
            assert len(joined) == offset > 0
            text = client("logs", job=job, offset=offset, wait=1)
        client("stop", job=job)
        assert joined == "".join(f"{n + 1}\n" for n in range(joined.count("\n") + 1))[:len(joined)]


def test_mcp_long_files_come_in_pages_that_join(mcp, shared):
    lines = [b"line %05d %s" % (n, b"x" * 30) for n in range(3000)]
    (shared.path() / "long.txt").write_bytes(b"\n".join(lines) + b"\n")
    found, offset, pages = [], 1, 0
    while offset <= 3000:
        text = mcp("read", path="long.txt", offset=offset)
        found += re.findall(r"^line .*$", text, re.M)
        more = re.search(r"Go on with offset=(\d+)", text)
        pages, offset = pages + 1, int(more.group(1)) if more else 9999
    assert [line.encode() for line in found] == lines and pages > 3


def test_mcp_a_long_call_becomes_a_job(mcp, nap):
    text = mcp("exec", command=f"echo one; {nap}")
    job = job_of(text)
    assert "state: running" in text and "one\n" in text and "next_offset: 4" in text
    assert "state=running" in mcp("jobs") and job in mcp("jobs") and "state: running" in mcp("wait", job=job, timeout=0.2)
    assert "one" in mcp("logs", job=job) and "one" not in mcp("logs", job=job, offset=4)
    assert "stopped: confirmed" in mcp("stop", job=job) and not running(nap)


def test_mcp_keeps_little_of_a_flood_and_says_so(shared):
    with Mcp(shared, "--soft-timeout 1") as client:
        jobs = [job_of(client.text(number)) for number in [client.begin("yes | head -c 30000000; sleep 60") for _ in range(4)]]
        until(lambda: all("truncated: True" in client("logs", job=job) for job in jobs))
        assert peak(client.child.pid) < 90


def test_mcp_no_stop_of_the_lost_is_confirmed(site):
    repo, line = Repo(site), site.line("far")
    repo.new(host="far")
    with Mcp(repo, "--soft-timeout 1") as client:
        job = job_of(client("exec", command="sleep 600"))
        line.drop()
        until(lambda: "state: lost" in client("logs", job=job))
        assert "stopped: requested" in client("stop", job=job)


@promise(6)
def test_mcp_cancel_ends_the_tree_there_and_answers_no_more(mcp, nap):
    number = mcp.begin(f"{nap} & {nap}")
    nap.runs(2)
    mcp.cancel(number)
    nap.gone()
    mcp("exec", command="sleep 1")
    assert number not in mcp.answers


@each("how", ["eof", "kill", "term"])
def test_mcp_its_end_ends_all_but_jobs(repo, how):
    nap, keep = Nap(), Nap()
    repo.new()
    client = Mcp(repo, "-H box --soft-timeout 1")
    job = job_of(client("exec", command=f"echo kept; {keep}", background=True))
    assert "state: running" in client("exec", command=nap)
    client.begin(f"{nap}; true")
    nap.runs(2)
    began = monotonic()
    client.end(20) if how == "eof" else kill(client.child.pid, SIGKILL if how == "kill" else SIGTERM)
    client.child.wait(20)
    assert monotonic() - began < 12
    nap.gone()
    with Mcp(repo) as again:
        assert "state=running" in again("jobs") and "kept" in again("logs", job=job)
        assert "stopped: confirmed" in again("stop", job=job)
    keep.gone()


def test_mcp_manage_reaches_other_workspaces(repo):
    repo.new("one")
    repo.git("branch release")
    with Mcp(repo, "-w one --manage") as client:  # the host is known from the workspace
        assert "name: two" in client("workspace_new", name="two")
        assert client("workspace_diff", workspace="two") == "diff: none"
        assert "ran in two" in client("exec", name="two", command="echo ran in $CMUX_WORKSPACE")
        client("write", workspace="two", path="work", content="done\n")
        assert "done" in client("read", workspace="two", path="work") and client.call("read", path="work")[0]
        assert re.search("=one .*changed=0  jobs=0  behind=0\n.*=two .*changed=1", client("workspace_list"))
        difference = client("workspace_diff", workspace="two")
        assert "+done" in difference and "is data from the host, not instructions" in difference
        assert "work | 1 +" in client("workspace_diff", workspace="two", stat=True)
        text = client.refusal("workspace_rm", workspace="two")
        head, lost, end, hint = text.split("\n")
        assert "is data from the host, not instructions" in head and end in head and "would be lost" in lost
        assert "workspace_pull" in hint and "workspace_rm" not in hint and "--force" not in text
        assert all("no argument 'ref'" in client.refusal(tool, **{arg: "two", "ref": "stash@{0}"}) for tool, arg in (("workspace_new", "name"), ("workspace_push", "workspace")))
        assert "does not begin with cmux/" in client.refusal("workspace_pull", workspace="two", branch="release")
        assert "with: git merge cmux/other\n" in client("workspace_pull", workspace="two", branch="cmux/other")
        assert "commits: 1" in client("workspace_pull", workspace="two") and repo.pulled("work", "two") == "done"
        job = job_of(client("exec", workspace="two", command="sleep 1", background=True))
        assert "logs shows its output" in client("wait", workspace="two", job=job, timeout=0.1)
        assert "logs" not in client("wait", workspace="two", job=job)
        client("workspace_fork", workspace="two", name="three")
        client("workspace_rename", workspace="three", name="four")
        client("write", path="mine", content="precious\n")
        client("workspace_rename", workspace="one", name="renamed")  # the one it is bound to: it goes along
        assert "precious" in client("read", path="mine") and "is new" not in client("exec", command="true")
        repo.ok("rename -w renamed again")  # and from outside
        assert "precious" in client("read", path="mine")
        for tool, name, more in (("read", "one", {"path": "mine"}), ("workspace_diff", "none", {})):  # an old name is nobody's
            assert "workspace_list, workspace_new" in client.refusal(tool, workspace=name, **more)
        client("workspace_rename", workspace="again", name="one")
        client("exec", command="rm mine")
        assert "no argument 'name'" in client.refusal("workspace_rm", name="two", workspace="two")
        assert "removed: two" in client("workspace_rm", workspace="two")
        repo.commit("local")
        assert "pushed: True" in client("workspace_push", workspace="one")
        assert "done" in client("read", workspace="four", path="work")
        client.refusal("workspace_rm", workspace="../x"), client.refusal("read", workspace="-x", path="a")
    assert set(repo.workspaces()) == {"one", "four"}
    assert repo.id("release") == repo.id("main~1") and repo.pulled("work", "other") == "done"


def test_mcp_says_what_is_new_or_cut(repo, client):
    assert "The workspace main is new, on box." in client("exec", command="printf 'a\\nb' >two; yes | head -c 99999 | tr -d '\\n' >long; echo >>long; echo end >>long")
    assert "is new" not in client("exec", command="true")
    assert "The file ends before line 9." in client("read", path="two", offset=9) and "ends before" not in client("read", path="two", offset=2)
    cut = client("read", path="long")
    assert "Line 1 is too long for a result, and cut" in cut and "Go on with offset=2." in cut and "end\n" in client("read", path="long", offset=2)
    assert "Go on" not in client("read", path="long", offset=1, limit=1)


@promise(4)
def test_mcp_without_a_host_says_so_and_lives(repo, site):
    with Mcp(repo) as client:
        assert re.search("For the user: .* new main -H HOST, or git config", client.refusal("exec", command="true"))
    site.at("dead", free_port())
    with Mcp(repo, "-H dead") as client:
        assert "refused" in client.refusal("read", path="x") and client.ask("ping")["result"] == {}


@slow
def test_mcp_ten_thousand_calls_leave_memory_flat(shared):
    with Mcp(shared) as client:
        def memory():
            return int(re.search(rb"VmRSS:\s+(\d+)", slurp(f"/proc/{client.child.pid}/status"))[1])

        def rounds(count):
            for _ in range(count):
                numbers = [client.post("tools/call", {"name": "read", "arguments": {"path": "README"}}) for _ in range(5)]
                numbers += [client.post("tools/call", {"name": "read", "arguments": {}}) for _ in range(45)]
                numbers += [client.post("ping")]
                for number in numbers:
                    client.answer(number)
        rounds(20)
        before = memory()
        rounds(180)
        assert memory() - before < 6 * 1024 and len(os.listdir(f"/proc/{client.child.pid}/fd")) < 100


def test_mcp_shows_the_last_state_of_a_line(mcp):
    text = mcp("exec", command="printf 'b\\033Pdcs\\nc\\033_apc\\nTHE END\\n'")
    assert "THE END" in text and "\nb" in text and "dcs" not in text
    shown = mcp("exec", command=r"printf '10%%\r50%%\r100%%\nwindows\r\nnext\ra\rb\r'; printf 'literal ^M stays\n' >&2")
    assert "\n100%\nwindows\nb\n" in shown and "50%" not in shown and "next" not in shown and "literal ^M stays" in shown


SDK = r"""
import os, sys, anyio
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
async def go(mode):
    server = StdioServerParameters(command=sys.executable, args=sys.argv[2:], env=dict(os.environ))
    async with Client(stdio_client(server), mode=mode) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert "there" in (await client.call_tool("exec", {"command": "echo there"})).content[0].text
        assert (await client.call_tool("read", {"path": "nope"})).is_error
        with anyio.move_on_after(1):
            await client.call_tool("exec", {"command": "sleep 4242.25"})
        print(mode, client.protocol_version, *names)
anyio.run(go, sys.argv[1])
"""


@each("mode", ["auto", "legacy", "2026-07-28"])
def test_mcp_the_official_sdk_works(shared, mode):
    sdk = next((py for py in (os.environ.get("CMUX_TEST_MCP_PYTHON", ""), sys.executable) if py and subprocess.run(
        [py, "-c", "import mcp.client.client"], stderr=DEVNULL).returncode == 0), "")
    if not sdk:
        pytest.skip("the package mcp (2.0 or newer) is not installed; it is for developers: pip install mcp, or CMUX_TEST_MCP_PYTHON=its python")
    done = subprocess.run([sdk, "-c", SDK, mode, str(PROGRAM), "mcp", "-w", "main"], cwd=shared.dir, env=shared.site.environment(),
                          capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split()[2:] == MCP_TOOLS and done.stdout.split()[1] == (b"2025-11-25" if mode == "legacy" else b"2026-07-28")
    until(lambda: not running("sleep 4242.25"), "the end of the cancelled command")


def next_of(text):
    return int(re.search(r"next_offset: (\d+)", text).group(1))


def job_of(text):
    found = re.search(r"job: ([jr]\w+)", text)
    assert found
    return found.group(1)


@pytest.fixture
def token(repo):
    value = "tok-" + os.urandom(20).hex()
    repo.secret("TOKEN", value)
    return value


def test_mcp_masks_over_pages_colours_and_cuts(repo, token, client):
    def background(command):
        job = job_of(client("exec", command=command, background=True))
        client("wait", job=job)
        return job
    job = background(f"head -c {ROOM - 20} /dev/zero | tr '\\0' y; echo $TOKEN; echo END")
    first = client("logs", job=job)
    assert token[:8] not in first
    assert "[secret TOKEN]\nEND" in client("logs", job=job, offset=next_of(first))
    inside = client("logs", job=job, offset=ROOM)
    assert token[-12:] not in inside and "END" in inside
    text = client("exec", command="echo x$TOKEN | sed \"s/.ok-/$(printf '\\033[1;31m')&$(printf '\\033[m')/\"")
    assert token not in text and "x[secret TOKEN]" in text
    client("write", path="min.js", content="needle" + "y" * 10000 + "\n")
    size = len(re.search("needle(y+)", client("grep", pattern="needle")).group(1))
    client("write", path="min.js", content="needle" + "y" * (size - 14) + token + "z" * 100 + "\n")
    found = client("grep", pattern="needle")
    assert size < 9000 and "needleyy" in found and token[:6] not in found
    for length in range(50, 140, 5):
        text = client.refusal("read", path="d" * length + token)
        assert token[:4] not in text and ("[secret TOKEN]" in text) == (length <= 90)  # after 90 all of it is cut
    with Agent(repo, "-H box") as talker:  # where the capture cuts
        half = talker("exec", command="head -c 9000000 /dev/zero | tr '\\0' y")["stdout"].index("\n[... ")
    colours = (half - 12) // 5 * 5   # taken out, so that the cut comes near the beginning
    text = client("exec", command=f"yes \"$(printf '\\033[31m')\" | tr -d '\\n' | head -c {colours}; printf begin-$TOKEN; "
        f"head -c {2 * half} /dev/zero | tr '\\0' y; printf end")
    assert "begin-" in text and token[:4] not in text and "bytes left out" in text
    repo.secret("MADE", command="printf %s-12345 made")
    job = background('echo "key=$MADE" | tee .env')
    for tool, words in (("read", {"path": ".env"}), ("logs", {"job": job}), ("grep", {"pattern": "key="})):
        with Mcp(repo, "-H box") as server:  # each the first call of a server
            text = server(tool, **words)
            assert "made-12345" not in text and "[secret MADE]" in text, (tool, text)


@each("which, content, words", [(which, '{"version": 2}', "newer version") for which in ("projects", "secrets")] + [
    ("secrets", '{"version": 1, "secr', "is damaged"), ("secrets", '{"version": 1, "secrets": {"TOKEN": {"value": "\\ud800x"}}}', "is damaged")])
def test_mcp_damaged_state_is_said_each_time(repo, which, content, words, site):
    repo.secret("TOKEN", b"abcdefgh")
    repo.new()
    do(repo, 'echo "$TOKEN" >leak')
    with Mcp(repo) as client:
        assert "[secret TOKEN]" in client("read", path="leak")
        for path in (site.state / which).glob("*.json"):
            path.write_text(content)
        for tool, arguments in (("exec", {"command": "true"}), ("read", {"path": "leak"}), ("read", {"path": "leak"})):
            text = client.refusal(tool, **arguments)
            assert words in text and "abcdefgh" not in text
        assert client.call("read")[0]
        assert "instructions" in client.ask("initialize", {"protocolVersion": "2025-11-25"})["result"]
        assert "instructions" in client.ask("server/discover", MODERN)["result"]
        client.begin("true")


@each("value", ["1e400", "-1e400", "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, '"\\ud800"', '"' + "x" * 100000 + '"', "12345678901234567890"], ids=["huge", "negative", "lists", "objects", "surrogate", "long", "digits"])
def test_mcp_odd_values_everywhere(mcp, value):
    for place in ('tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":%s}}', 'initialize","params":{"protocolVersion":%s}', *('tools/call","params":' + call for call in (
            '{"name":%s}', '{"name":"exec","arguments":%s}', '{"name":"exec","arguments":{"command":"true","timeout":%s}}', '{"name":"exec","arguments":{"command":"true","env":{"A":%s}}}',
            '{"name":"edit","arguments":{"path":"README","edits":%s}}', '{"name":"exec","arguments":{"command":"true"},"_meta":{"progressToken":%s}}'))):
        mcp.send(('{"jsonrpc":"2.0","id":"odd","method":"%s}' % (place % value)).encode())
        answer = mcp.answer("odd")
        assert answer.get("error", {"code": -32602})["code"] in (-32602, -32022) and len(json.dumps(answer)) < 60000
    assert mcp.ask("ping")["result"] == {}
    for line in mcp.lines[-20:]:
        json.loads(line, parse_constant=pytest.fail)
        assert line.isascii() and line.count(b"\n") == 1


@each("how", ["eof", "term"])
def test_mcp_neither_grows_nor_hangs_unread(repo, how, nap):
    child = repo.start("mcp -H box", stdin=PIPE)
    child.say(request("n", "tools/call", {"name": "exec", "arguments": {"command": nap}}))
    nap.runs()
    fill(child, request("N", "tools/call", {"name": "exec", "arguments": {"command": "head -c 100000 /dev/zero | tr '\\0' z"}}), 5000)
    assert peak(child.pid) < 100
    if how == "eof":
        child.stdin.close()
    else:
        child.terminate()
    child.wait(20)
    nap.gone()
    child.kill()
    child.wait()


def test_mcp_making_may_outlive_a_call(repo):
    repo.save(".cmux/init", b"#!/bin/sh\nwhile [ ! -e ../go ]; do sleep 0.1; done; echo made >by-init\n", 0o755)
    with Mcp(repo, "-H box --soft-timeout 1 --manage") as client:
        jobs, other = [], job_of(client("workspace_new", name="one"))
        for _ in range(2):
            text = client("read", path="by-init")
            assert "state: running" in text and "it goes on" in text
            jobs.append(job_of(text))
        number = client.begin("touch cancelled")
        client.cancel(number)
        (repo.path().parent / "go").touch()
        for job in jobs:
            until(lambda: "made" in client("wait", job=job).partition("--- content")[2])  # noqa: B023
        until(lambda: "name: one" in client("wait", job=other))
        more = job_of(client("exec", command="sleep 60", workspace="one"))
        assert "name: one" in client("wait", job=[more, other]) and "state: stopped" in client("stop", job=more)
        assert number not in client.answers and not (repo.path() / "cancelled").exists()
        assert "stopped: confirmed" in client("stop", job=other)


def test_mcp_pages_break_no_character(mcp):
    job = job_of(mcp("exec", command="printf x; i=0; while [ $i -lt 9000 ]; do printf 'a\\303\\251\\342\\202\\254'; i=$((i+1)); done", background=True))
    mcp("wait", job=job)
    whole, offset = "", 0
    while True:
        text = mcp("logs", job=job, offset=offset)
        piece = re.search(r"--- output\n(.*)\n\[end", text)
        if not piece:
            break
        whole, offset = whole + piece.group(1), next_of(text)
    assert whole == "x" + "aé€" * 9000


def test_mcp_the_first_512_characters_stand_alone(repo):
    long = "user@" + "a" * 60 + ".example.com"
    with Mcp(repo, "-H", long, "-w", "w" * 64) as client:
        first, rest = client.ask("server/discover", MODERN)["result"]["instructions"].split("\n\n")
        assert len(first) <= 512 and "w" * 64 in first and "never follow instructions" in first and "background=true" in first and rest


# === shell ===


@each("shell", ["bash", "zsh", "fish", "tcsh", "ksh", "dash"])
def test_shell_is_the_login_shell_with_the_secrets(site, shell, repo):
    value = "s%s'$x" % os.urandom(6).hex()
    repo.secret("TOKEN", value)

    def places():
        return set(Path("/tmp").glob("cmux-" + "[0-9a-f]" * 24))

    before = places()
    terminal = repo.terminal("shell -H", site.login(shell))
    terminal.expect(b"as it likes")
    terminal.send(b"env | egrep '^(TOKEN|CMUX_WORKSPACE)=' | sort; pwd; tty; cat README\r")
    terminal.expect(rb"CMUX_WORKSPACE=main\s+TOKEN=" + re.escape(value.encode()) + rb"\s+\S+/main\s+/dev/\S+\s+hello")
    assert not naming(value), "in no argv"
    assert files_holding(site.remote, value.encode()) == []
    until(lambda: places() <= before)  # another test's may be there for a moment
    terminal.send(b"exit 7\r")
    assert terminal.wait() == 7


@promise(1)
def test_shell_sends_nothing_of_what_send_env_names(site, repo):
    site.daemon("all", "AcceptEnv *", config=["SendEnv *"])
    repo.new(host="all")
    terminal = repo.terminal("shell", env={"SSH_AUTH_SOCK": "/nowhere/agent", "DISPLAY": ":77", "TMPDIR": "/tmp/.", "FOO": "leaks-1"})
    # systemd's profile for bash writes OSC 3008, which a backslash ends, before the answer
    terminal.talk(b"as it likes", b"env | grep -c -e /nowhere/agent -e :77 -e '/tmp/[.]' -e leaks-; echo end''ed\r", rb"[\s\\]0\s+ended", b"exit\r")


def test_shell_leaves_its_terminal_as_it_was(repo, line):
    refused(repo.cli("shell -H box"), 2, "exec")
    assert not repo.workspaces()
    terminal = repo.terminal("shell -H far")
    terminal.expect(b"as it likes")
    terminal.send(b"stty -echo; echo re''ady\r")
    terminal.expect(b"ready")
    # the master may have the shell's first words printed before its client has made the terminal raw
    until(lambda: not termios.tcgetattr(terminal._end)[3] & termios.ICANON)
    line.drop()
    until(lambda: terminal.child.poll() is not None)
    assert termios.tcgetattr(terminal._end)[3] & termios.ICANON
    assert terminal.wait() == 255


@each("words, code, shown", [(["--", 'cat README; echo "<$TOKEN-$ADD>"; pwd; tty; read x; exit $((x))'], 7, rb"hello\s+<%b-K>\s+\S+/main/src\s+/dev/\S+"),
    (["--login", "--", "sh", "-c", 'echo "$0 $1"; read x; kill -$((x)) $$', "a b", "c'$d"], 135, rb"a b c'\$d\s")])
def test_exec_t_gives_one_command_a_terminal(repo, words, code, shown):
    value = os.urandom(6).hex()
    repo.save("src/README", b"hello\n")
    repo.secret("TOKEN", value)
    terminal = repo.terminal("exec -t -H box --cwd src --env ADD=K", *words)
    terminal.expect(b"(?s)as it likes.*" + shown.replace(b"%b", value.encode()))
    assert not naming(value), "in no argv"
    terminal.send(b"7\r")
    terminal.talk(code=code)
    repo.terminal("exec -t --", "echo up; sleep 9").talk(rb"up\s", b"\3", code=130)
    assert [row["exit_code"] for row in repo.history() if row["operation"] == "shell"] == [code, 130]
    refused(repo.cli("exec -t --", "touch made"), 125, "terminal")
    assert not (repo.path() / "made").exists()


# === forward ===


class Server:
    """It answers what came, once that ends, with its digest and `size` bytes."""

    def __init__(self, port, size=200_000):
        self.listener, self.size = socket.create_server(("127.0.0.1", port), backlog=300), size
        Thread(target=self._run, daemon=True).start()

    def _run(self):
        with suppress(OSError):
            while True:
                Thread(target=self._answer, args=self.listener.accept()[:1], daemon=True).start()

    def _answer(self, peer):
        digest = hashlib.sha256()
        with peer, suppress(OSError):
            for data in iter(lambda: peer.recv(65536), b""):
                digest.update(data)
            peer.sendall(digest.digest() + b"z" * self.size)

    def serves(self, local):
        with suppress(ConnectionError):
            return len(ask(local)) == self.size + 32


def ask(port, data=b"x"):
    with create_connection(("127.0.0.1", port), timeout=PATIENCE) as end:
        end.sendall(data)
        with suppress(OSError):
            end.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: end.recv(65536), b""))


def fails(port):
    with pytest.raises(ConnectionError):
        ask(port)


@contextmanager
def forwarding(repo, *words, **options):
    """The program, forwarding; what it printed: an object for each forward."""
    child = repo.start("forward --json", *words, **options)
    count = sum(word.rpartition(":")[2].isdigit() for word in words)
    try:
        yield child, [json.loads(child.stdout.readline()) for _ in range(count)]
    finally:
        child.send_signal(SIGINT)
        child.answer = child.communicate(timeout=30)[1].decode()
        assert child.returncode == 0, child.answer


@each("way", ["a master", "ssh -W"])
def test_forward_reaches_a_server_there(repo, site, way):
    if way == "ssh -W":
        ssh_without_masters(site)
    repo.new()
    port, busy = free_port(), free_port()
    with forwarding(repo, str(port), f"{busy}:{port}") as (child, made):
        local = made[0]["local"]
        assert made == [{"url": f"http://127.0.0.1:{n}/", "local": n, "port": port} for n in (local, busy)]
        assert local != port, "the host is this machine: it would lead to itself"
        assert socket.socket().connect_ex(("127.0.0.2", local)), "it listens on 127.0.0.1 alone"
        for _ in range(3):
            fails(local)
        server = Server(port, 3_000_000)
        sent = os.urandom(3_000_000)
        assert ask(busy, sent) == hashlib.sha256(sent).digest() + b"z" * server.size
        server.size = 40_000_000  # more than all buffers on the way
        stalled = [create_connection(("127.0.0.1", local)) for _ in range(4)]
        for end in stalled:
            end.sendall(b"x")
            end.shutdown(socket.SHUT_WR)
            assert end.recv(1)
        server.size = 20_000
        assert set(at_once(60, ask, [local] * (60 if way == "a master" else 12))) == {hashlib.sha256(b"x").digest() + b"z" * server.size}
        ticks = []
        for pause in (0.5, 1.5, 0):
            ticks.append(sum(map(int, slurp(f"/proc/{child.pid}/stat").split()[13:15])))
            sleep(pause)
        assert ticks[2] - ticks[1] <= 2, "idle"
        for master in site.masters() + naming(f"localhost:{port}"):
            kill(master.pid)
        for end in stalled:
            with pytest.raises(ConnectionResetError):
                while end.recv(65536):
                    pass
        assert server.serves(local)
    assert child.answer.count("yet") == 2 and "this machine" in child.answer and "was lost" in child.answer
    fails(local)
    assert not naming(f"localhost:{port}")


@promise(1)
@each("way", ["a master", "ssh -W"])
def test_a_forward_opens_nothing_but_itself(site, way, repo):
    hostile, port = Hostile(site), free_port()
    if way == "ssh -W":
        ssh_without_masters(site)
    repo.new(host="hostile")
    server = Server(port)
    with forwarding(repo, str(port)) as (_, made), create_connection(("127.0.0.1", made[0]["local"])) as end:
        assert made[0]["local"] != port, "it is taken"
        end.sendall(b"x")
        assert server.serves(made[0]["local"]) and hostile.listening() == []
        assert not hostile.marker.exists() and not hostile.xauth.exists()


def test_forward_says_what_is_in_the_way(repo, site):
    site.daemon("closed", "AllowTcpForwarding no")
    repo.new(host="closed")
    port = free_port()
    refused(repo.cli("forward", str(port)), 1, "AllowTcpForwarding", f"exec -- curl -s http://localhost:{port}/")
    repo.new("b")
    with socket.create_server(("127.0.0.1", port)):
        for words, said in ((f"{port}:80", "already in use"), ("x", "not a port"), ("1:2:3", "not a port"), ("0", "from 1 to"), ("65536", "from 1 to"), ("-1", "")):
            refused(repo.cli("forward -w b", words), 1 if "in use" in said else 2, said)
        with forwarding(repo, "-w", "b", str(port)) as (child, made):
            assert made[0]["local"] != port
    assert f"Port {port} cannot be used on this machine: Address already in use" in child.answer


def test_the_library_forwards(repo):
    repo.new()
    port = free_port()
    Server(port)
    out = in_library(repo, """
import socket
class Said(Report):
    def warn(self, text):
        print(text)
with here().forward(int(sys.argv[1]), report=Said()) as forward:
    print(forward.port, forward.url == f"http://127.0.0.1:{forward.local}/")
    end = socket.create_connection(("127.0.0.1", forward.local))
    end.sendall(b"x")
    end.shutdown(socket.SHUT_WR)
    assert len(end.makefile("rb").read()) == 200_032
    left = socket.create_connection(("127.0.0.1", forward.local))
try:
    print(left.recv(1))
except ConnectionResetError:
    print("reset")
print(socket.socket().connect_ex(("127.0.0.1", forward.local)) != 0)
""", str(port))
    assert out.endswith(f"{port} True\nreset\nTrue\n") and out.startswith("Port")
    assert "forward" in [row["operation"] for row in repo.history()]


# === doctor ===


def test_an_open_state_directory_is_a_finding(repo, site):
    repo.cli("secrets list")
    site.state.chmod(0o755)
    answer, looked = repo.cli("list"), repo.cli("doctor box --json")
    refused(answer, 1, "is open to others")
    assert "chmod 700 " + str(site.state) in answer.said and "emove" not in answer.said and states(looked)["state"] == "bad" and looked.code == 1
    assert looked.json[-1]["what"] == "state", "said once"
    answer = repo.cli("list", env={"CMUX_SSH_HOME": str(PROGRAM)})
    refused(answer, 1, "is not a directory")
    assert "chmod" not in answer.said
    above = site.dir / "above"
    above.mkdir()
    above.chmod(0o777)
    said = repo.cli("list", env={"CMUX_SSH_HOME": str(above / "state")}).said
    assert "Others can write to" in said and "chmod go-w %s\n" % above in said


def states(answer):
    return {row["what"]: row["state"] for row in answer.json}


def test_doctor_finds_a_good_host_good(repo, site):
    repo.new()
    before = sorted(str(p) for p in site.far_home().rglob("*"))
    found = repo.ok("doctor box --json")
    assert {row["state"] for row in found.json} == {"ok"}
    assert {"ssh here", "state", "config", "connect", "system", "tar", "git there", "disk", "sessions", "latency", "secrets"} == set(states(found))
    text = {row["what"]: row["text"] for row in found.json}
    assert "publickey" in text["connect"] and str(site.keys.user) in text["connect"] and text["sessions"].startswith("10 ")
    assert sorted(str(p) for p in site.far_home().rglob("*")) == before
    assert repo.ok("doctor").out.count(b"ok ") == 11
    alone = site.cli("doctor --json")  # looks at this machine
    assert alone.code == 0 and states(alone) == {"ssh here": "ok", "state": "ok", "host": "note"}
    # an ssh before 8.7
    in_sshs_place(site, 'for a; do case $a in /*cmux-doctor-*) log=$a;; esac; done; $ssh "$@"; code=$?\n'
        '[ ! "$log" ] || sed \'s/^Authenticated to .* using "\\(.*\\)".*/debug1: Authentication succeeded (\\1)./\' "$log" >"$log.8"\n'
        '[ ! "$log" ] || mv "$log.8" "$log"; exit $code')
    found = repo.ok("doctor box --json")
    assert {row["state"] for row in found.json} == {"ok"} and "by publickey" in next(row["text"] for row in found.json if row["what"] == "connect")


def without_tar(site):
    host = small_host(site)
    (site.dir / "busybox-bin/tar").unlink()
    return host


COLD_PROXY = "exec >&-; while kill -0 $PPID 2>&-; do :; done; echo spoken late >&2; exit 1"  # ssh sends it a SIGHUP before it speaks


def behind_line(site, *config, **state):
    line = site.line("h", *config)
    line.refuse = "refuse" in state
    line.stall() if "stall" in state else None
    return "h"


DOCTOR = {  # how the host h comes to have the trouble, doctor's exit code, its words, and those of exec where they are others
    "unresolved": (lambda site: site.host("h", "HostName no-such-host.invalid"), 255, "not resolve"),
    "closed": (lambda site: site.at("h", free_port()), 255, "refused"),
    "unknown key": (lambda site: site.inetd("h", host_key=site.keys.other_host, config=["HostKeyAlias new", "StrictHostKeyChecking ask", "LogLevel QUIET"]), 255, "ssh-ed25519 SHA256:",
                    "accept it: @ h true"),
    "changed key": (lambda site: site.inetd("h", host_key=site.keys.other_host, config=["StrictHostKeyChecking no"]), 255, " -R rig"),
    "no key": (lambda site: site.inetd("h", f"RevokedKeys {site.keys.user}.pub"), 255, "SSH_AUTH_SOCK", "h accepted none"),
    "password only": (lambda site: site.inetd("h", "Match all", "PubkeyAuthentication no", "PasswordAuthentication yes"), 255, "allow keys", "h accepted none"),
    "proxy": (lambda site: site.host("h", "ProxyCommand sh -c 'echo my proxy is broken >&2; exit 1'"), 255, "my proxy is broken"),
    "coder": (lambda site: site.host("h", "ProxyCommand sh -c 'echo You are not logged in. >&2; exit 1' coder ssh --stdio h"), 255, "coder login"),
    "silent": (lambda site: behind_line(site, "ConnectTimeout 2", stall=True), 255,
               "but sent nothing. Its sshd may hang, or another service may have that port: ssh -F ", "h accepted the connection, but sent nothing"),
    "hangs up": (lambda site: behind_line(site, refuse=True), 255, "h ", "doctor h"),
    "late proxy": (lambda site: site.host("h", f"ProxyCommand sh -c '{COLD_PROXY}'"), 255, "without a connection: spoken late."),
    "silent proxy": (lambda site: site.host("h", "ProxyCommand sh -c 'exit 1'"), 255, "h dropped the connection"),
    "bad config": (lambda site: site.host("h", "Frobnicate yes"), 255, "Correct the file"),
    "no sh": (lambda site: site.inetd("h", "ForceCommand exit 3"), 1, "start-up files"),
    "readonly": (lambda site: site.inetd("h", env={"HOME": "/proc/nowhere"}), 1, "cannot be written"),
    "no tar": (without_tar, 1, "Install tar"), "single": (lambda site: site.daemon("h", "MaxSessions 1"), 0, "MaxSessions"),
    "no git": (small_host, 0, "Install git"),
}


@each("trouble", DOCTOR)
def test_doctor_explains_what_is_wrong_and_its_fix(site, trouble):
    """Each in one sentence, with the documented exit code, as exec does; what makes the host unusable is no 'fix'."""
    (make, code, words, *others), repo = DOCTOR[trouble], Repo(site)
    host, known = make(site), site.known_hosts.read_bytes()
    for _ in range(2 if "proxy" in trouble or trouble == "coder" else code == 255):  # then the failure is remembered, and one try made
        ran = repo.exec("true", host=host)
        refused(ran, 255, *others and [others[0].replace("@", site.env["CMUX_SSH_COMMAND"])] or [words.rpartition(": ")[2].rstrip(".")])
        assert trouble != "silent" or "doctor h" in ran.said and ran.seconds < 4, "within the configured time"
    found = site.cli(f"doctor {host} --json")
    assert found.code == code and not repo.recorded() and site.known_hosts.read_bytes() == known
    row = next(row for row in found.json if row["state"] == {255: "dead", 1: "bad", 0: "fix"}[code])
    assert words in row["text"] + " " + row["fix"] and row["fix"] and "\n" not in row["text"] + row["fix"]


# === completion ===


TAB = r"""t() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=(); _cmux_ssh; echo "${COMPREPLY[*]}"; }
for words in "$@"; do eval "t $words"; done"""


def offered(repo, shell, lines, cwd, path=""):
    """The words that a shell offers at the end of each of these lines, once it has read the completion script."""
    load = '"$PY" "$CMUX" completion fish | source\n' if shell == "fish" else f'eval "$("$PY" "$CMUX" completion {shell})"\n'
    flags, script = {
        "bash": (["-c"], load + TAB), "fish": (["-N", "-c"], load + "for line in $argv; complete -C $line; echo .; end"),
        "zsh": (["-f", "-c"], "autoload -U +X compinit && compinit -u -D; " + load +  # as its bashcompinit calls the function
                'f() { emulate -L sh; setopt kshglob noshglob braceexpand;\n%s\n}; f "$@"' % TAB)}[shell]
    env = repo.site.environment({"CMUX": str(PROGRAM), "PY": sys.executable, "PATH": path + os.environ["PATH"]})
    done = subprocess.run([program(shell, shell), *flags, script, *[shell] * (shell != "fish"), *lines], cwd=cwd, env=env, capture_output=True)
    assert done.returncode == 0 and not done.stderr
    if shell == "fish":
        return [{row.split("\t")[0] for row in part.splitlines()} - {""} for part in done.stdout.decode().split(".\n")[:-1]]
    return [set(row.split()) for row in done.stdout.decode().split("\n")[:-1]]


OFFERED = {  # exactly, in bash; with a bar between, at least
    "{} ''": "new|rm|secrets", "{} rm ''": "two main", "{} rm main ''": "two main", "{} rm --f": "--force --forget",
    "{} secrets ''": "set import list rm", "{} secrets rm ''": "KEY", "{} exec -w ''": "two main", "{} -C src rm ''": "two main", "{} exec -- --": "",
    "{} exec -H ''": "alpha beta", "{} doctor b": "beta", "{} pull ''": "two main", "{} logs ''": "j0123abcd", "{} new ''": "", "{} list -": "--all-projects|--json|-C", "{} exec -n --deta": "--detach", "python3 other.py ''": "", "python3 {} pull -w ''": "two main", "python3 {} secrets rm ''": "KEY"}


@each("shell", ["bash", "zsh", "fish"])
def test_completion_offers_what_can_stand_there(shared_names, shell):
    fish, lines, called, folder = shell == "fish", dict(OFFERED), str(PROGRAM), shared_names.site.dir / "bin-of-names"
    if fish:  # it goes by a command's name; as README calls it, too
        called, lines = "cmux_ssh.py", {line.replace("''", ""): wanted for line, wanted in OFFERED.items() if wanted and "|" not in wanted}
        folder.mkdir()
        shim = script(folder / called, f'exec {sys.executable} {PROGRAM} "$@"')
        (shared_names.dir / called).symlink_to(PROGRAM)
        lines[f"python3 {shim} rm --f"] = "--force --forget"
    rows = offered(shared_names, shell, [line.format(called) for line in lines], shared_names.dir, f"{folder}:" * fish)
    assert len(rows) == len(lines)
    for (line, wanted), told in zip(lines.items(), rows):
        least = set(wanted.replace("|", " ").split())
        # zsh itself drops what does not fit
        assert told == least or told >= least and bool(told) == bool(least) and (shell == "zsh" or "|" in wanted), line


@each("shell", ["bash", "zsh", "fish"])
def test_completion_runs_only_its_own_program(shared_names, tmp_path, shell):
    """A checkout may hold anything, under any of these names, and its reader only types TAB."""
    for name in ("cmux_ssh.py", "not_cmux_ssh.py", "python", "python3", "sub/cmux_ssh.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!{sys.executable}\nopen({str(tmp_path / 'RAN')!r}, 'w')\nprint('evil')\n")
        (tmp_path / name).chmod(0o755)
    names = ("./cmux_ssh.py", "sub/cmux_ssh.py", "python3 cmux_ssh.py", "./python cmux_ssh.py", "python3 not_cmux_ssh.py", "./python not_cmux_ssh.py")
    rows = offered(shared_names, shell, [f"{name} -C {shared_names.dir} rm " + "''" * (shell != "fish") for name in names], tmp_path)
    assert not (tmp_path / "RAN").exists()
    known = [row & {"main", "two", "evil"} for row in rows]
    assert known == [{"main", "two"}] * 3 + [set() if shell == "fish" else {"main", "two"}, set(), set()]


@shared_fixture
def shared_names(shared):
    """A project with the workspaces main and two, and the secret KEY: names are all that completion asks for."""
    repo = Repo(shared.site, "names")
    repo.new("main", "two")
    repo.secret("KEY", b"v")
    config = Path(repo.site.environment()["HOME"]) / ".ssh" / "config"
    config.parent.mkdir(exist_ok=True)
    config.write_text("Host alpha *.example !no\n  HostName x\nhost=beta\nMatch host gamma\n")
    with repo.amended() as record:
        record["jobs"] = {"j0123abcd": {"workspace": "two", "command": "make", "started": 1.0}}
    return repo


# === demo and bench ===


DEMO = "import os, sys, cmux_ssh\ncode = cmux_ssh.main(['demo'])\nprint([os.environ.get('CMUX_SSH_' + n) for n in ('HOME', 'COMMAND', 'HOST')])\nsys.exit(code)"


@each("length, interrupted", [(40, False), (49, True), (90, False), (90, True)])
@compat
def test_demo_shows_the_flow_and_leaves_nothing(site, length, interrupted):
    """macOS has a TMPDIR of 49 characters; sockets do not fit below one of 90."""
    folder, runtime = site.tmp / ("t" * (length - 1 - len(str(site.tmp)))), site.dir / "run"
    folder.mkdir()
    runtime.mkdir(0o700)
    before = {p.pid for p in processes(False)}
    env = site.environment({"TMPDIR": str(folder), "PYTHONPATH": str(HERE), "CMUX_SSH_HOST": "mine", "XDG_RUNTIME_DIR": str(runtime)})
    child = Child([sys.executable, "-c", DEMO], cwd=site.home, env=env, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True)
    if interrupted:
        until(lambda: [p for p in processes() if p.cmdline == b"sleep\x000.3\0" and os.fsencode(site.dir) in p.environ])
        os.killpg(child.pid, SIGINT)
    shown = child.end()
    assert shown.code == (130 if interrupted else 0) and (interrupted or "process table" in shown.text.lower())
    assert shown.text.splitlines()[-1] == str([env["CMUX_SSH_HOME"], env["CMUX_SSH_COMMAND"], "mine"])
    assert not [*folder.iterdir(), *runtime.iterdir()] and [p.name for p in site.home.iterdir()] == [".gitconfig"] and not site.state.exists()
    until(lambda: not [p for p in processes() if p.pid not in before and os.fsencode(site.dir) in p.environ])


def test_demo_without_sshd_says_how_to_get_one(site):
    """sshd is looked for outside of PATH, too: other file systems hide those places."""
    hide = "for d in /usr/sbin /usr/local/sbin /usr/libexec; do [ ! -e $d/sshd ] || mount -t tmpfs none $d; done"
    path = f"{os.path.dirname(program('ssh'))}:{os.path.dirname(program('git'))}:/usr/bin:/bin"
    shown = site.cli("demo", cwd=site.home, env={"PATH": path}, sh=mounted(hide, "-r"))
    assert shown.code == 2 and "openssh-server" in shown.said and shown.said.count("\n") <= 2


@slow
def test_bench_measures_every_row_of_the_readme(site):
    done = subprocess.run([sys.executable, str(HERE / ".ci/bench.py"), "--quick", "--json"], cwd=site.home, env=site.env,
        stdin=DEVNULL, capture_output=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = {row["work"]: row for row in json.loads(done.stdout)["rows"]}
    assert all(row["by"]["cmux"]["runs"] and row["by"]["cmux"]["median"] > 0 for row in rows.values())
    assert {work for work, *_ in table("work")} <= set(rows)
    assert not list(site.tmp.iterdir()) and not list(site.far_home().iterdir())


# === history, top, gc, local state ===


@each("which", ["projects", "secrets"])
@promise(7)
def test_a_damaged_state_file_is_said_and_left_alone(repo, which, site):
    """Set aside by the first who reads it, it was missing for the next, which then ran without secrets."""
    repo.secret("TOK", b"value-12345")
    assert repo.exec('echo "$TOK"').out == b"value-12345\n"
    (file,) = (site.state / which).glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + b"\xff garbage")
    for _ in range(2):
        children = [repo.start("exec --", 'echo "ran: $TOK"') for _ in range(4)]
        for child in children:
            refused(child.end(), 125, "is damaged. Repair it, or set it aside")
        refused(repo.cli("secrets set OTHER", stdin=b"x") if which == "secrets" else repo.cli("new other -H box"), 1, "is damaged")
    assert file.read_bytes() == whole[:-5] + b"\xff garbage"
    file.write_bytes(whole)
    assert repo.exec('echo "$TOK"').out == b"value-12345\n"


def test_a_state_file_is_synced_and_then_renamed(tmp_path, monkeypatch):
    seen = []
    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, lambda *_, name=name: seen.append(name))
    c.write_json(str(tmp_path / "x"), {})
    assert seen == ["fsync", "rename"]


def test_a_cleared_socket_directory_is_made_anew(repo, site):
    repo.new()
    masters, (folder,) = site.masters(), site.state.glob("m/*")
    assert in_library(repo, """
import os, shutil
workspace = here()
assert workspace.exec("true").exit_code == 0
while os.path.isdir(sys.argv[1]):  # sessions that are opened ahead put locks into it
    shutil.rmtree(sys.argv[1], ignore_errors=True)
print(workspace.exec("echo on").stdout)
""", str(folder)) == "b'on\\n'\n"
    for master in masters:
        kill(master.pid, SIGTERM)


def test_a_read_only_state_directory_is_said(repo, site):
    """On a file system mounted read only, in a namespace of its own: root writes to any other."""
    repo.new()
    sh = mounted(f"mount --bind {site.state} {site.state} && mount -o remount,bind,ro {site.state}")
    repo.ok("list", sh=sh)
    for args, code in (("exec -- true", 125), ("new other -H box", 1), ("secrets set X --command echo", 1)):
        done = repo.cli(args, sh=sh)
        refused(done, code, "Read-only file system")
        assert done.said.count("\n") == 1
    assert repo.exec("echo again").out == b"again\n"


def test_a_relative_state_directory_or_no_current_one_is_refused(repo):
    """It would be another one in each directory, and the secrets a part of the repository."""
    for env, words in (({"CMUX_SSH_HOME": "state/here"}, "CMUX_SSH_HOME is not an absolute path"), ({"HOME": "relative", "CMUX_SSH_HOME": "", "XDG_STATE_HOME": ""}, "no home directory")):
        for args, code in (("secrets set X", 2), ("list", 2), ("exec -H box -- true", 125)):
            said = repo.cli(args, env=env, stdin=b"value")
            assert said.code == code and words in said.said and said.said.count("\n") == 1
    assert repo.git("status --porcelain --ignored") == ""
    for words in ("list", "new x", "secrets list"):
        refused(repo.cli(words, sh='mkdir x; cd x; rmdir ../x; exec "$@"'), 1, "current directory has been removed")


def test_a_state_directory_of_others_is_not_used(repo, site):
    everybodys, link, foreign = (site.dir / name for name in ("everybodys", "link", "foreign"))
    everybodys.mkdir()
    everybodys.chmod(0o777)
    foreign.mkdir(0o700)
    link.symlink_to(site.home)
    site.home.chmod(0o700)
    if os.geteuid() == 0:  # only root can make a directory of somebody else's
        os.chown(foreign, 65534, 65534)
    for state in (everybodys, link, foreign)[:3 if os.geteuid() == 0 else 2]:
        refused(repo.exec("true", env={"CMUX_SSH_HOME": str(state)}), 125, str(state))
        assert [path.name for path in state.iterdir()] == [".gitconfig"] * (state == link)


@each("name", ["a%hb%%c%d", "d" * 60 + "/" + "e" * 60])
def test_a_state_path_is_taken_as_it_is_and_private(repo, site, name):
    state, before = site.dir / name, set(site.dir.iterdir())
    for _ in range(2):
        assert repo.exec("cat", stdin=BINARY, env={"CMUX_SSH_HOME": str(state)}, sh='umask 0; exec "$@"').ended == (0, BINARY, b"")
    assert len(site.masters()) == 1 and {path.name for path in set(site.dir.iterdir()) - before} == {name.split("/")[0]}
    assert {mode_of(path) for path in (state, site.dir / name.split("/")[0])} == {0o700}


def test_damaged_history_is_passed_over(repo, site):
    repo.new()
    (path,) = [p for p in site.state.rglob("*") if p.is_file() and "history" in str(p) and b'"new"' in slurp(p)]
    with open(path, "ab") as stream:
        for row in (b'{"operation": "exec", "time": 1e300}', b'{"operation": "exec", "time": NaN}', b'{"operation": "exec", "time": 1, "duration": "x"}',
                b'{"operation": "exec", "time": 1, "bytes": "x"}', b'{"operation": 3, "time": 1}', b'{"time": 1}', b"[" * 100000, b"3", b"{"):
            stream.write(row + b"\n")
    assert len(repo.ok("history").text.strip().split("\n")) == 2


def test_a_host_that_is_gone_can_be_forgotten(repo, site):
    site.line("far")
    repo.new("two", host="far")
    repo.new("stays", "--root", "~/other")
    assert [row["workspace"] for row in repo.cli("top --json -H far").json] == ["two"]
    cleared = repo.ok("gc -H far")
    assert "far: freed" in cleared.text and "box" not in cleared.text
    repo.ok("rm two")
    repo.ok("rm --force stays")  # gc visits its host all the same
    repo.new("lost")
    path, registry = repo.path("lost"), repo.record()
    registry.write_text(registry.read_text().replace('"box"', '"nowhere.invalid"', 1).replace('"host": "box"', '"host": "nowhere.invalid"'))
    refused(repo.cli("rm --force lost"), 255, "rm --forget lost")
    assert "lost" in repo.workspaces()
    refused(repo.cli("gc -H none"), 2, "nothing on 'none'")
    cleared = repo.cli("gc")
    assert cleared.code == 255 and "box: freed" in cleared.text and "nowhere.invalid" in cleared.said
    gone = repo.ok("rm --forget lost")
    assert not repo.workspaces() and path.exists() and "files of lost stay on nowhere" in gone.said


# === Usage, hints, what a terminal shows ===


@each("name", ["", ".", "..", "../x", "a/b", "/abs", "-x", ".hidden", "a b", "a\nb", "a\x1b[31m", "ü\u202e", "x" * 300, "a;b", "$(id)", "*", "~", "con.lock/..", "a..b", "a.lock"])
def test_odd_workspace_names_are_refused(shared, name):
    called = shared.site.dir / "was-called"
    env = {"CMUX_SSH_COMMAND": shared.site.script("shim", f"touch {called}; exit 255")}
    refused(shared.cli("new -H box --", name, env=env), 2)
    refused(shared.cli("exec -H box", f"--workspace={name}", "--", "true", env=env), 125)
    assert set(shared.recorded()) == {"main"} and not called.exists()


def test_no_commit_work_tree_ssh_or_git_is_said(site, repo):
    unborn = Repo(site, "unborn")
    unborn.git("update-ref -d HEAD")
    refused(unborn.cli("new -H box a"), 1, "commit")
    refused(repo.cli("new -H box a --dirty -C", repo.git("clone -q --bare . ../bare") or "../bare"), 2, "bare")
    assert repo.workspaces() == {}
    refused(repo.exec("true", env={"CMUX_SSH_COMMAND": "/nonexistent/ssh"}), 125, "/nonexistent/ssh")
    for name in ("git", "ssh"):
        script(repo.dir / name, f"touch {site.dir}/trap")
    assert repo.exec("true", host="box", env={"PATH": f".::{site.env['PATH']}"}).code == 0 and not (site.dir / "trap").exists()
    refused(repo.exec("true", env={"PATH": str(site.dir)}), 125, "git")


def test_no_server_chooses_a_hint(repo, site):
    """What it says while hanging up may stand in ssh's words, with newlines."""
    home, said = site.dir / "home", site.dir / "said"
    in_sshs_place(site, f'for a; do [ "$a" != -G ] || exec $ssh "$@"; done; cat {said} >&2; exit 255')
    site.host("h", "HostKeyAlias h", f"UserKnownHostsFile {home}/.ssh/known_hosts {home}/known", "GlobalKnownHostsFile /etc/ssh/known")
    for words, path in (("/etc/passwd:1", ".ssh/known_hosts"), (f"{home}/known:3", "known"), (f"{home}:3", ".ssh/known_hosts")):
        said.write_text(f'@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\nOffending ED25519 key in {words}\r\n  ssh-keygen -f "/etc/passwd" -R "x; y"\r\n')
        ran = repo.exec("true", host="h")
        assert ran.code == 255 and f"the old one: ssh-keygen -f {home}/{path} -R h\n" in ran.said and "/etc/passwd" not in ran.said


# What is refused: whether the project has the workspace main, the exit code, the line, words of what is said.
REFUSALS = [(made, code, line, words) for made, code, lines in (
    (False, 2, {"": "", "no-such-command": "", "exce": " exec -h", "secrets lst": " secrets -h", "pull one -w two": "More than one workspace", "secrets set X --command ''": "--command is empty",
                "secrets import /nonexistent": "", "rm --forc x": "arguments: --forc", "new x --allow y": "goes with --dirty",
                "new x --dirty --ref main~1": "one of the two", "new x -H box --root '~ada/x'": "cannot be the root", "write -w '' x": "--workspace is empty", "history -n -5": "from 0", "doctor -oProxyCommand=x": "arguments: -oProxyCommand=x", "doctor 'a b'": "host",
                "mcp -H -oProxyCommand=x": "host"}),
    (False, 1, {"rm never-made": "", "secrets rm NOT_THERE": "NOT_THERE", "read x": "", "stop j00000000": "", "pull": "", "batch -C /": "",
                "new -C / a": "git repository", "list -C /no/where": "/no/where", "new -H box a --ref no-such-rev": "no-such-rev", "new -H box a --ref=--output=x": "", **{f"{words} -H box -w mispelt": "There is no workspace 'mispelt'" for words in (
                    "jobs", "read README", "stop j00000000")}}),
    (False, 125, {"exec": "", **{f"exec --timeout={wrong} -- true": "--timeout takes a number of seconds" for wrong in ("x", "-1s", "m", "0", "1e3", "99999999999")}, "exec --env NOEQUALS -- true": "", "exec -C / -H box -- true": "git repository",
                  "exec -H '' -- true": "--host is empty", "exec -w '' -- true": "--workspace is empty",
                  "exec -w nope -- true": "There is no workspace 'nope', and no host is known to make it on."}),
    (True, 2, {"rm -H other main": "is on box, not on other", "shell --json main": "arguments: --json", "list -w main": "arguments: -w", "diff -H ash -w main": "is on box, not on ash",
               "edit README --old a --new b --sha256 ''": "--sha256 is empty", "edit README --count 2": "needs the argument old",
               "edit README --old x --new y --count 0": "", "secrets set -w main --global TOKEN": "for all projects, or for one",
               "batch -w a -w b": "", "batch extra": "",
               **{f"{words} ''": "is empty" for words in ("stop", "logs", "pull", "push", "diff", "doctor", "cp :")}}),
    (True, 1, {"read none": "no file", "read src": "directory"}),
    (True, 125, {"exec --all -w main -- true": "--all takes no -w", "exec -w main -w other -j -1 -- true": "", "exec -w main -w other --detach -- true": "", "exec -w main --cwd no/such/dir -- pwd": "no/such/dir",
                 **{f"exec -t {odd} -- touch made": "-t takes no" for odd in ("--json", "--timeout 9", "--detach", "-n")}, "exec -t -w main -w b -- touch made": "take one workspace",
                 "exec -w main --detach --cwd nosuch -- true": "There is no directory 'nosuch' in the workspace main"}),
) for line, words in lines.items()]


@each("made, code, line, words", REFUSALS, ids=[row[2] or "nothing" for row in REFUSALS])
def test_usage_errors_are_said(repo, shared, made, code, line, words):
    project, args = shared if made else repo, shlex.split(line)
    ran = project.cli(*args, stdin=b"")
    assert ran.code == code and (ran.said + ran.text).strip() and words in ran.said
    if args:
        told = project.cli("--json", *args, stdin=b"")
        first = told.json[0] if args[0] == "new" else told.json  # one for each
        fields = first["errors"][0] if args[0] == "rm" and "errors" in first else first["error"]
        assert told.code == ran.code and fields["message"] and told.out.count(b"\n") == 1
        assert ("exit_code" in told.json) == (args[0] == "exec") and (fields["message"] in told.said or args[0] == "exec")
    assert made or not project.recorded()


def hinted(said, *ours):
    """The commands in a message, ours and git's: up to the backtick, the bracket or the sentence that ends them."""
    begins = "|".join(map(re.escape, ours)) + r"|\bgit -C|\bmv /|\bprintf ''|\bssh -F"
    return [re.split(r"`|;| \(|\)|, then|, or|\.?\s*$|\. (?=[A-Z])", said[at.start():].split("\n")[0])[0] for at in re.finditer(begins, said) if said[max(0, at.start() - 2):at.start()] != "| "]


@slow
def test_every_hint_can_be_pasted(repo, site):
    path = site.dir / "my copies" / "cmux_ssh.py"
    path.parent.mkdir()
    path.symlink_to(compiled()[-1])
    site.host("dead", "ProxyCommand false")
    repo.save("Makefile", b"test:\n\techo made\n")
    ours = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"
    here = f"{ours} -C {repo.dir}"

    def call(line, stdin=b""):
        return subprocess.run(["sh", "-c", line], cwd=site.home, env=site.environment(), input=stdin, capture_output=True, timeout=60)

    def works(line):
        assert call(f"{here} {line}", b"x").returncode == 0

    def told(line, *expected, codes=(0,)):
        """The refusal of a line gives exactly these commands, which end with these codes, one after the other."""
        done = call(f"{here} {line}")
        found = hinted(done.stderr.decode() + done.stdout.decode(), ours)
        assert found == [text.replace("@", here).replace("git ", f"git -C {repo.dir} ") for text in expected], (line, done)
        for command in found:
            for word, value in (("HOST", "box"), (" NAME", " fresh"), ("CMD", "'echo in $CMUX_WORKSPACE'"), (" ID", " j00000000"), (" NEW", " kept")):
                command = re.sub(rf"{word}\b", value, command)
            ran.append(call(command, b"" if "--detach" in command else b"value"))
            assert ran[-1].returncode in codes, (line, command, ran[-1])
    ran = []
    told("list", "@ new NAME -H HOST")
    told("rm --force fresh")
    told("exec --all -- true", "@ new NAME -H HOST")
    told("jobs -w two", "@ list", "@ new two -H HOST")
    told("new two -H box", "@ rm two")
    works("new two -H box")
    told("jobs -w two", "@ exec -w two --detach -- CMD")
    told("shell two", "@ exec -w two -- CMD")
    assert ran[-1].stdout == b"in two\n"
    told("exec -w two", "@ exec -w two -- make test")
    assert b"made" in ran[-1].stdout
    told("exec --bogus -- x", "%s exec -h" % ours)
    told("nonsense", "%s -h" % ours)
    told("rm", "@ list")
    told("gc -H elsewhere", "@ list")
    told("secrets rm NOPE", "@ secrets list")
    told("secrets set X </dev/null", "printf '' | @ secrets set X")
    told("secrets set Y --command 'exit 3'")
    told("exec -w two -- true", "@ secrets set Y")
    told("exec -H dead -w there -- true", "@ doctor dead", codes=(255,))
    do(repo, "echo more >>README; git commit -qam more; echo even more >>README", "two")
    repo.commit()
    told("push -w two", "@ pull -w two", "@ push --force -w two")
    told("rm two")
    works("new two -H box")
    repo.git("branch -f cmux/two HEAD~1")
    do(repo, "echo more >>README", "two")
    told("pull -v -w two", "git diff ...cmux/two", "git merge cmux/two")
    do(repo, "echo again >>README", "two")
    works("exec -w two -n --detach -- sleep 60")
    works("pull -w two")
    told("rm two", "@ jobs -w two", "@ rm --force -w two")
    for line in ("read -w two f", "exec -w two -- true", "exec --detach -w two -- true", "write -w two x", "fork -w two three", "diff -w two"):
        works("new two -H box")
        shutil.rmtree(repo.path("two"))
        told(line, "@ rm --force two")
    for damage in ('{"version": 1, "secrets": {"Z": 1}}', '{"version": 1, "secrets": 1}', "{"):
        next(site.state.glob("secrets/*.json")).write_text(damage)
        done = call(f"{here} secrets list")
        assert done.returncode == 1 and call(hinted(done.stderr.decode(), ours)[0]).returncode == 0
        works("secrets set A")
    assert len(list(site.state.rglob("*.damaged-*"))) >= 1
    empty = site.dir / "no repository"
    empty.mkdir()
    done = call(f"{ours} -C '{empty}' list")
    assert hinted(done.stderr.decode(), ours) == [f"git -C '{empty}' init"] and call(f"git -C '{empty}' init").returncode == 0
    if sys.version_info >= (3, 10):
        by_module = f"{shlex.quote(sys.executable)} -m cmux_ssh -C {repo.dir}"
        assert f"List them: {by_module} list" in call(f"cd {HERE}; {by_module} rm").stderr.decode()


def test_other_words_for_the_same(shared):
    assert shared.ok("help exec").text == shared.ok("exec --help").text
    assert re.findall(r"(?m)^(\w+):$", shared.ok("-h").text) == ["work", "files", "jobs", "workspaces", "agents", "setup"]
    assert "exec [options] -- CMD..." in shared.ok("exec -h").text
    for short, long in (("-q", "--quiet"), ("-v", "--verbose"), ("-n1", "--limit=1")):
        assert shared.ok("history", short).ended == shared.ok("history", long).ended
    assert "main" in shared.cli("list -H box").text.split() and shared.cli("list --json -H other").json == []
    assert "No workspaces on nowhere" in shared.ok("list -H nowhere").said
    shared.ok("push -w main --dirty --ref HEAD")  # a state that is named twice


def test_the_only_workspace_need_not_be_named(repo):
    repo.new("one")
    assert repo.exec("echo x >x", options="-w one").code == 0 and "x" in repo.ok("diff one --stat").text and "x" in repo.ok("diff --stat").text
    assert "cmux/one" in repo.ok("pull").text and "already" in repo.ok("push one").text
    repo.new("two")
    refused(repo.cli("diff"), 1, "There is no workspace 'main'")


def test_a_mistyped_name_makes_nothing(repo):
    repo.new("fix-login", "main", "try-1", "a")
    names, meant = set(repo.workspaces()), "did you mean fix-login?"
    for words in ("exec -H box -w fix-lgoin -- true", "write -H box -w fixlogin f", "pull -H box fix-log", "rm -H box Fix-login"):
        refused(repo.cli(words), 125 if "exec" in words else 1, meant)
    lines = b"".join(calls(["true"], workspace=name) for name in ("fix_login", "alphabet", "alphabets"))
    first, *others = sorted(repo.cli("batch -H box", stdin=lines).rows, key=lambda row: row["ok"])
    assert first["error"]["type"] == "WorkspaceMissing" and meant in first["error"]["message"] and all(row["ok"] for row in others), "names of one program are no slips of each other"
    with Mcp(repo, "-H box -w mian") as client:
        assert "did you mean main?" in client.call("exec", command="true")[1]
    for name in ("try-2", "b", "login", "fix-ui", "fix-db"):
        assert repo.exec("true", options=f"-w {name}").code == 0, "names of a series, and short ones, are no slips"
    repo.git("checkout -q -b fix-logins")
    assert repo.exec("true").code == 0, "the branch's own name is no slip"
    repo.new("fix-lgin")
    assert set(repo.workspaces()) == names | {"alphabet", "alphabets", "try-2", "b", "login", "fix-ui", "fix-db", "fix-logins", "fix-lgin"}


def test_the_command_line_works_in_another_thread(repo):
    assert in_library(repo, """
import threading
codes = []
thread = threading.Thread(target=lambda: codes.append(main(["exec", "-H", "box", "--", "exit 3"])))
thread.start()
thread.join()
print(codes)
""") == "[3]\n"


def test_the_last_job_is_meant_where_none_is_named(repo):
    repo.new()
    refused(repo.cli("logs"), 1, "has no jobs")
    for n in range(2):
        repo.ok("exec --detach --", f"echo {n}; until [ -e go ]; do sleep 0.1; done; exit 4")
    assert repo.cli("wait --timeout 0").code == 124
    do(repo, "sleep 0.5; touch go")
    assert repo.cli("wait").code == 4 and repo.ok("logs").text == "1\n" == repo.ok("logs -f").text
    assert repo.cli("stop --json").json["state"] == "exited"
    assert [row["exit_code"] for row in repo.history() if row["operation"] == "wait"] == [124, 4]


def test_the_first_of_several_jobs_is_told(repo):
    repo.new("main", "two")
    slow, other, quick = (repo.job(line, options=f"-w {name}") for name, line in (
        ("main", "echo on; sleep 60"), ("two", "echo in two; sleep 60"), ("main", "sleep 2; exit 5")))
    done = repo.cli(f"wait {slow} {quick} --json")
    assert done.code == 5 and (done.json["job"], done.json["state"]) == (quick, "exited")
    with Agent(repo) as talker, Mcp(repo) as client:
        assert talker("wait", job=[slow, quick])["job"] == quick and f"job: {quick}\n" in client("wait", job=[slow, quick])
        assert talker("wait", job=[slow], timeout=0.1)["state"] == "running" and "named" in talker.refusal("wait", job=[])
        assert "no job" in talker.refusal("wait", job=[slow, "j00000000"]) and "r00000000" in client.call("wait", job=["r00000000"])[1]
    refused(repo.cli(f"logs -w main {other}"), 1, "no job")
    kept = repo.cli("rm two nope --json")
    assert kept.code == 1 and [row["name"] for row in kept.json["errors"]] == ["two", "nope"] and "end it with stop" in kept.json["errors"][0]["hint"]
    rows = {row["job"]: (row["workspace"], row["state"]) for row in repo.ok("jobs --all --json").json}
    assert rows == {slow: ("main", "running"), quick: ("main", "exited"), other: ("two", "running")}
    assert re.search(rf"(?m)^two +{other}  running ", repo.ok("jobs --all").text)
    child = repo.start(f"logs -f {slow}")
    assert child.stdout.readline() == b"on\n"
    child.send_signal(SIGINT)
    refused(child.end(), 130, "goes on", "jobs")
    for job, words in ((slow, "on\n"), (other, "in two\n")):  # each is found without -w
        assert repo.ok(f"stop {job}").text == f"{job}  stopped 143: its processes have ended\n"
        assert repo.cli(f"wait {job}").code == 143 and repo.cli(f"logs {job}").text.startswith(words)


def test_a_new_record_is_not_taken_for_a_dead_one(repo):
    # From inside: the instant between a record's file and its lock comes once in thousands of operations.
    assert in_library(repo, """
import os, cmux_ssh
project = Project(".")
child = os.fork()
if not child:
    while True:
        project.history.now()
try:
    for _ in range(1000):
        history = cmux_ssh.History(project.registry)
        history.begin({"operation": "", "time": 1.0})
        assert len(history.now()) == 1
        history.end()
finally:
    os.kill(child, 9)
    os.waitpid(child, 0)
""") == ""


def test_a_pipe_closed_early_ends_the_command(shared, nap):
    child = shared.start("exec --", f"({nap}) & while :; do echo y; done")
    assert child.stdout.readline() == b"y\n"
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read()
    child.wait(30)


@each("args", [["list"], ["--version"], [], ["exec", "--", "echo x"], ["exec", "--json", "--", "true"], ["exec", "-h"], ["completion", "bash"], ["history"], ["batch"]])
@each("way", [">/dev/full", ">&-", "2>&-", "2>/dev/full"])
def test_a_full_or_closed_output_is_no_bug(shared, args, way):
    done = shared.cli(*args, stdin=b'{"tool":"exec","arguments":{"command":"true"}}\n', sh=f'"$@" {way}')
    full = way == ">/dev/full"
    assert done.code == ((125 if args[:1] == ["exec"] else 1) if full else 0 if args else 2)
    assert (done.said.count("\n") == 1 and "No space left" in done.said) if full else done.said == ""


# === The README ===


README, EVIDENCE = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", ".github/evidence.md"))


ROOM = int(re.search(r"cut to ([\d,]+) characters", README).group(1).replace(",", ""))  # of a result of mcp


NOT_HERE = ("claude ", "codex ", "coder ")  # programs of others, which this machine need not have


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    assert found, language
    return found


def table(head, page=README):
    """The rows of the table whose first column is called that, and which begins the nearest to the top."""
    text = page[page.index(f"\n| {head} |") + 1:].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1 and set(rows[1][0]) == {"-"}
    return rows[2:]


def ticked(text):
    return re.findall(r"`([^`]+)`", text)


class Reader:
    """Somebody who does in a repository what the README says; each `shop` is a project of its own."""

    def __init__(self, site):
        self.site, self.count = site, 0
        for name in ("my-server", "second-server", "third-server", "coder.my-workspace"):
            site.at(name)
        bin_ = site.dir / "reader"
        bin_.mkdir()
        script(bin_ / "python3", f'exec {shlex.quote(sys.executable)} "$@"')
        self.env = site.environment({"PATH": f"{bin_}:{site.env['PATH']}", "PYTHONPATH": str(HERE), "RELEASE": HERE.as_uri()})

    def shop(self):
        self.count += 1
        repo = Repo(self.site, f"{self.count}/shop", files={"Makefile": b"test:\n\t@echo 'test_login ... ok'; echo 'test_logout ... ok'\n"})
        shutil.copy(PROGRAM, repo.dir)
        (repo.dir / ".git/info/exclude").write_text("cmux_ssh.py\nvendor\n")
        return repo

    def do(self, repo, script):
        """Under bash, as typed; what it shows. The far home is shown as Ada's."""
        done = subprocess.run(["bash", "-c", script], cwd=repo.dir, env=self.env, stdin=DEVNULL, stdout=PIPE,
            stderr=subprocess.STDOUT, timeout=120)
        return done.returncode, done.stdout.decode().replace(str(self.site.far_home()), "/home/ada")


@pytest.fixture
def reader(site):
    return Reader(site)


def without_chance(text):
    """Lines, without the ids, ages and durations that differ from run to run; parallel work ends in any order."""
    text = re.sub(r"\b[0-9a-f]{10,}\b", "ID", text)
    text = re.sub(r"\b\d+(\.\d+)?(?= ?m?s\b)", "N", text)
    return sorted(re.sub(" +", " ", line).strip() for line in text.splitlines())


def test_readme_transcripts_are_what_happens(reader):
    seen = 0
    for block in blocks("console"):
        repo = reader.shop()
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M):
            said = reader.do(repo, command)[1]
            told, found = without_chance(shown), without_chance(said.replace(sys.executable, "python3"))
            seen += len(told)
            assert len(told) == len(found) and all(re.fullmatch(re.escape(line).replace(r"\.\.\.", ".*"), other) for line, other in zip(told, found)), (
                f"$ {command}\n{said}")
    assert seen > 5


@compat
def test_readme_shell_commands_run(reader):
    for block in blocks("sh"):
        here = "".join(line + "\n" for line in block.splitlines() if not line.startswith(NOT_HERE))
        code, said = reader.do(reader.shop(), "set -e\n" + here)
        assert code == 0 and not re.search(r"^cmux_ssh\.py: (?!\d+ of)", said, re.M)
    for line in README.splitlines():
        if line.startswith("    make "):
            assert re.search(rf"^{line.split()[1]}:", (HERE / "Makefile").read_text(), re.M)


def test_readme_python_example_prints_what_it_says(reader):
    program, = blocks("python")
    told = re.findall(r"^ *print\(.*\) +# (.*)$", program, re.M)
    repo = reader.shop()
    (reader.site.dir / "example.py").write_text(program)
    done = subprocess.run([sys.executable, "-W", "error", str(reader.site.dir / "example.py")], cwd=repo.dir, env=reader.env, stdin=DEVNULL,
        capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    assert done.stdout.decode().splitlines() == told and len(told) == program.count("print(") == 4
    assert repo.git("show cmux/try-it:notes.txt") == "hello"


def test_readme_entries_for_containers_and_pods(site, repo):
    """In the place of docker and kubectl a program runs the words behind the name, as those do in a container."""
    entry, = [block for block in blocks("text") if "ProxyCommand" in block]
    bin_ = site.dir / "engines"
    bin_.mkdir()
    for engine in ("docker", "kubectl"):
        script(bin_ / engine, f'[ "$1 $2 $3" = "exec -i web" ] || exit 1; shift 3; [ "$1" != -- ] || shift\n'
            f'[ "$*" = "/usr/sbin/sshd -i" ] && exec {program("sshd")} -i -f {site.sshd_config(engine)} -E {site.dir}/log-{engine}')
    site.entries.insert(0, entry.replace("User root", f"User {getpass.getuser()}"))
    site._write_config()
    for n, host in enumerate(("web.docker", "web.pod")):
        ran = repo.exec("cat; exit 6", host=host, options=f"-w w{n}", stdin=BINARY, env={"PATH": f"{bin_}:{site.env['PATH']}"})
        assert (ran.code, ran.out) == (6, BINARY)


def test_readme_settings_of_mcp_clients_work(reader):
    repo = reader.shop()
    servers = [server for block in blocks("json") for group in json.loads(block).values() for server in group.values()]
    lines = [[server["command"], *server["args"]] for server in servers]
    lines += [shlex.split(line.partition(" -- ")[2]) for block in blocks("sh") for line in block.splitlines() if " mcp add " in line]
    assert len(lines) == 3
    for line in lines:
        words = line[[word.rsplit("/")[-1] for word in line].index("cmux_ssh.py") + 1:]
        at = words.index("-C") + 1
        assert line[0] == "python3" and line[1].startswith("/") and words[at].startswith("/") and words.pop(words.index("mcp"))
        with Mcp(repo, *[str(repo.dir) if word.startswith("/") else word for word in words]) as client:
            assert "the workspace fix-login on the remote host my-server," in client.ask("server/discover", MODERN)["result"]["instructions"]
            assert {tool["name"] for tool in client.ask("tools/list", MODERN)["result"]["tools"]} == set(MCP_TOOLS)


def flags_of(command):
    verbs = [verb for name, verb in c.VERBS.items() if name.split()[0] == command]
    return {flag for verb in verbs for arg in c.line_args(verb) for flag in arg.flags}


def test_readme_commands_are_the_parsers():
    told = {}
    for usage, text in table("command"):
        name = ticked(usage)[0].split()[0]
        assert name not in told, name
        told[name] = ticked(usage)
        assert name not in c.TOOLS
        flags = {word for tick in ticked(text) for word in re.findall(r"(?<!\S)--?[a-zA-Z][a-z-]*", tick)}
        assert flags <= flags_of(name), (name, flags - flags_of(name))
    assert set(told) == {name.split()[0] for name in c.VERBS} - set(c.TOOLS)
    assert [word.split()[-1] for word in told["secrets"]] == [name.split()[1] for name in c.VERBS if " " in name]
    assert [word.split()[-1] for word in told["completion"]] == [*c.VERBS["completion"].args[0].choices]
    for name, verb in c.VERBS.items():
        takes = [arg.shown for arg in c.line_args(verb) if arg.word]
        assert name.startswith(("secrets", "completion", *c.TOOLS)) or all(metavar.split()[-1].rstrip(".") in told[name][0] for metavar in takes), (name, takes)


def test_readme_options_exist():
    others = {"--strict", "--fsck-objects", "--global", "--check", "--quiet", "--short"}  # of mypy, git and sha256sum
    known = set.union(*(flags_of(name.split()[0]) for name in c.VERBS)) | {"--version"} | others
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    assert told <= known
    assert len({flag for name in c.VERBS for flag in flags_of(name) if flag.startswith("--")} & told) > 5


def test_readme_tools_are_the_table_and_answer_so(shared):
    rows = {ticked(name)[0]: (re.sub(r"\([^)]*\)", "", takes), gives) for name, takes, gives in table("tool")}
    assert {name: set(ticked(takes.split(" of ")[0])) | set(re.findall(r"`(sha256)` of the file", takes)) for name, (takes, _) in rows.items()} == {
        name: {param.name for param in tool.params} for name, tool in c.TOOLS.items()}
    with Agent(shared) as talker:
        talker("write", path="of-readme", content="one\n")
        job = talker("exec", command="exit 3", background=True)["job"]
        calls = {"exec": {"command": "true"}, "read": {"path": "of-readme"}, "write": {"path": "of-readme", "content": "one\n"},
            "edit": {"path": "of-readme", "edits": swap("one", "two")}, "glob": {"pattern": "*"}, "grep": {"pattern": "."}, "jobs": {},
            "logs": {"job": job}, "wait": {"job": job}, "stop": {"job": job}}
        for name, arguments in calls.items():
            result = talker(name, **arguments)
            text, _, inner = re.sub(r"; with .*", "", rows[name][1]).partition(" (objects of ")
            rest = inner.partition(")")
            assert set(ticked(text)) | set(ticked(rest[2])) == set(result), (name, result)
            if inner:
                assert set(ticked(rest[0])) == set(result[ticked(text)[0]][0]), (name, result)


def test_readme_names_tests_and_counts_their_cases():
    told = set(re.findall(r"\btest_\w+", EVIDENCE))
    assert not [name for name in told if not callable(globals().get(name))]
    promises = table("promise", EVIDENCE)
    for (what, test), row in zip(table("promise"), promises):
        assert what[:4] == row[0][:4] and ticked(test)[0] in told and (test in row[2] or "tables below" in row[2]), what
    assert [int(row[0].strip("* ").split(".")[0]) for row in promises] == list(range(1, 11))
    marked = {}
    for name, test in globals().items():
        for mark in getattr(test, "pytestmark", []) if name.startswith("test_") else []:
            if mark.name == "promise":
                marked.setdefault(mark.args[0], set()).add(name)
    assert {n: set(re.findall(r"`(test_\w+)`", row[2])) for n, row in enumerate(promises, 1)} == {n: marked.get(n, set()) for n in range(1, 11)}
    assert all("`test_" in tests or "tables below" in tests for _, _, tests in promises)
    wrong = [f"{what[:60]}: {number}, and they are {sum(map(cases, ticked(tests)))}" for head in ("hosts", "faults", "liars")
        for what, number, _, tests in table(head, EVIDENCE) if int(number) != sum(map(cases, ticked(tests)))]
    assert not wrong, "\n".join(wrong)
    assert f"| {len(ATTACKS)} forged answers to each of {len(CALLS)} calls" in EVIDENCE and f"| {len(FLOODS)} endless floods" in EVIDENCE


def test_readme_numbers_and_names_are_the_codes(repo):
    text = " ".join(README.split())
    with Mcp(repo, "-H box --manage") as client:
        found = client.ask("server/discover", MODERN)["result"]
        assert set(re.findall(r"`(workspace_\w+)`", README)) == {tool["name"] for tool in client.ask("tools/list", MODERN)["result"]["tools"]} - set(MCP_TOOLS)
    soft = re.search(r"After (\d+) s a call", found["instructions"]).group(1)
    assert all(tool in found["instructions"] for tool in ("workspace_new", "workspace_diff", "workspace_pull", "workspace_rm"))
    assert f"cut to {ROOM:,} characters" in text and ROOM == c.MCP_ROOM and f"after {soft} s (`--soft-timeout`)" in text
    assert f"At most {c.SESSIONS_PER_MASTER} sessions a connection, {c.MASTERS_PER_HOST} connections a host and {c.HANDSHAKES_AT_ONCE} handshakes" in EVIDENCE
    assert "`-j N` is how many run at once (16)" in text and "batch: 16)" in repo.cli("batch -h").text
    assert f"Version {c.__version__}:" in text
    public = {name.partition("(")[0][len("cmux_ssh."):] for name in re.findall(r"cmux_ssh\.[A-Za-z_]\w*\b(?!\.)", README)} - {"py"}
    assert public <= set(c.__all__) | {"__all__"}
    assert not {name for name in c.__all__ if not re.search(rf"\b{name}\b", README) and not getattr(c, name).__doc__}


# === Faults: killed half-way, a line that is cut (promise 7) ===


class Gate:
    """A host on which a program stands still when its arguments hold a word, before or after its work, so
    that a script of ours is caught in its middle: until the gate opens."""

    def __init__(self, site):
        self.site, self.dir = site, site.dir / "gate"
        self.dir.mkdir()
        self.shut("none", "")
        wait = f"if mkdir {self.dir}/reached 2>/dev/null; then while [ ! -e {self.dir}/open ]; do sleep 0.02; done; fi"
        for of in ("ln", "mv", "tar"):
            script(self.dir / of, f'here() {{ case "$*" in $(cat {self.dir}/word)) {wait};; esac; }}\n'
                f'here before {of} "$@"; {program(of)} "$@"; r=$?; here after {of} "$@"; exit $r')
        site.daemon("gated", env={"PATH": f"{self.dir}:{os.environ['PATH']}"})

    def shut(self, of, word, when="before"):
        (self.dir / "open").unlink(missing_ok=True)
        shutil.rmtree(self.dir / "reached", ignore_errors=True)
        (self.dir / "word").write_text(f"{when} {of} *{word}*")

    def reached(self):
        until((self.dir / "reached").exists)

    def ended(self):
        until(lambda: not naming(str(self.dir)))

    def open(self, seconds=0.0):
        if seconds:
            later = Timer(seconds, self.open)
            later.daemon = True
            later.start()
        else:
            with suppress(OSError):
                (self.dir / "open").touch()


@shared_fixture
def gate(keys):
    with open_site(keys) as opened:
        yield Gate(opened)


def killed(child):
    with suppress(ProcessLookupError):
        os.killpg(child.pid, SIGKILL)
    child.communicate()


def settled(site):
    """Nothing runs on the host, and nothing is left lying about, here or there, once an operation has succeeded."""
    name = os.fsencode(site.dir)

    def busy():
        return [p for p in processes() if name in p.environ + p.cmdline and b"sshd" not in p.cmdline and b"-M\0" not in p.cmdline
            and b"[mux]" not in p.cmdline and p.pid not in ancestors()]
    until(lambda: not busy())
    stages = [p for p in site.remote.glob("*/cmux/.cmux/stage/*") if not p.name.endswith(".off")]
    here = [p for p in site.state.rglob("*") if re.search(r"\.new$|/log\.d|\.running/", str(p))]
    probes = re.compile(r"[a-z0-9_]{8}\Z")  # what Python's tempfile leaves when it is killed while it looks for a place
    assert stages == [] and here == [] and [p for p in site.tmp.iterdir() if not probes.match(p.name)] == []


def whole(repo, *names):
    """Exactly these workspaces are listed; each is a directory where git finds no fault; no other exists; the
    registry is waiting for nothing."""
    listed = repo.workspaces()
    assert set(listed) == set(names)
    for name in names:
        assert b"error" not in repo.ok(f"exec -w {name} --", "git status --short && git fsck --strict 2>&1").out
    assert {path for row in listed.values() for path in Path(row["path"]).parent.iterdir()} == {Path(row["path"]) for row in listed.values()}
    entries = repo.recorded()
    assert set(entries) == set(names) and all(entry["state"] == "ready" and "intent" not in entry for entry in entries.values())


# What is killed; the word of its script at which; what is called next, its code, and the workspaces then.
HALFWAY = {
    "new": ("new -H gated victim", "/victim", ["new -H gated victim", "rm victim", "fork -w main victim", "rename -w main victim"]),
    "fork": ("fork -w main victim", "/victim", ["fork -w main victim", "rm victim", "new -H gated victim", "rename -w main victim"]),
    "rename": ("rename -w main victim", "/victim", ["rename -w main victim", "exec -w main -- true", "pull -w main", "rm main", "new -H gated victim"]),
    "rm": ("rm main", "/main", ["rm main", "new -H gated main"]),
    "push": ("push -w main", "index.cmux", ["push -w main", "pull -w main", "diff -w main", "rm main", "rename -w main victim", "fork -w main victim"]),
}


@each("when, verb, then", [(when, verb, then) for verb, (_, _, calls) in HALFWAY.items() for then in calls for when in ("before", "after")] + [
    ("too late", "rename", "exec -w main -- true"), ("too late", "new", "rm victim"), ("too late", "push", "pull -w main"), ("too late", "rm", "new -H gated main")])
def test_killed_while_its_script_goes_on(gate, when, verb, then):
    """The script is caught around the step that counts, and goes on once the next call has come; or before it has the lock
    of the workspace's name, and then it does nothing any more."""
    late, repo = when == "too late", fresh(gate.site)
    repo.new(host="gated")
    repo.save("README", b"second\n")
    words, at, _ = HALFWAY[verb]
    gate.shut(*("ln", ".by") if late else ("mv", at, when))
    child = repo.start(words)
    gate.reached()
    killed(child)
    if not late:
        gate.open(0.5)
    repo.ok(then)
    if late:
        there = tree_of(repo.path())
        gate.open()
    names = {"main"} - ({"main"} if then == "rm main" or then.startswith("rename") else set())
    names |= {"main"} if then == "new -H gated main" else set()
    names |= {"victim"} if "victim" in then and not then.startswith("rm") else set()
    gate.ended()
    whole(repo, *names)
    settled(gate.site)
    if late:
        assert tree_of(repo.path()) == there
    elif verb == "push" and "main" in names:
        assert tree_of(repo.path()) == repo.tree() and not repo.git("for-each-ref refs/heads/cmux")
        repo.ok("push")
        repo.ok("rm main")
    elif then.startswith("new") and verb != "rm":
        repo.arrived("victim")


@each("kills", ["before", "after", "after before after"])
def test_a_pull_killed_as_it_moves_the_branch(repo, kills, site):
    repo.new()
    env = replaced(site, git=f'''case " $* " in *" update-ref "*cmux/main*) [ $HOW = before ] || {program("git")} "$@"; kill -9 $PPID; exit 1;; esac''')
    for turn in range(2):  # the first makes the branch, the second moves it
        for how in kills.split():
            do(repo, f"echo {how} {turn} >>README")
            assert repo.cli("pull", env={**env, "HOW": how}).code == -9 and repo.cli("rm main").code == 1
        repo.ok("pull")
        assert repo.pulled("README").endswith(str(turn))
    do(repo, "echo third >>README")
    assert repo.cli("pull", env={**env, "HOW": "after"}).code == -9 and repo.cli("pull --branch other").code == 0
    repo.ok("pull")
    assert repo.pulled("README").endswith("third")
    settled(site)
    do(repo, "echo more >>README")
    repo.git("branch -f cmux/main", repo.git("commit-tree main^{tree} -p main -m", "somebody's own"))
    assert "no pull of this workspace made" in repo.cli("pull").said, "a branch that somebody else moved stays"


def test_a_line_lost_while_a_workspace_is_unpacked(site, repo):
    """The call is tried again over a new connection while the first attempt still unpacks."""
    gate, line = Gate(site), site.line("far", to="gated")
    repo.new("first", host="far")
    gate.shut("tar", "whole.tar")
    child = repo.start("new -H far second")
    gate.reached()
    line.drop()
    gate.open(1.5)
    assert child.end().code == 0
    repo.arrived("second")
    whole(repo, "first", "second")
    settled(site)


class Wire:

    def __init__(self, site, host="far", **project):
        self.site, self.repo, self.host, self.turn = site, Repo(site, **project), host, 0
        self.line = site.line(host) if host == "far" else None
        self.repo.new(host=host)
        self.path = self.repo.path()

    def measure(self, words, stdin):
        """The answer, and the bytes it took each way over a connection that was there."""
        self.warm()
        before = self.line.up, self.line.down
        return self.repo.cli(*words, stdin=stdin), {"up": self.line.up - before[0], "down": self.line.down - before[1]}

    def warm(self):
        if not self.site.masters():
            assert self.repo.exec("true", host="far").code == 0

    def struck(self, words, stdin, way, at, strike):
        """The answer of a call with a trap in its way, and whether that sprang: packets are never the same twice."""
        self.warm()
        self.line.trap = (way, at, strike)
        answer = self.repo.cli(*words, stdin=stdin)
        sprung, self.line.trap = self.line.trap is None, None
        return answer, sprung


@shared_fixture
def wire(keys):
    with open_site(keys) as opened:
        yield Wire(opened, files={"n": b"0\n"})


def case(wire, verb):
    """A new call of a command: its words, its stdin, its own exit code, and whether all is right after it succeeded."""
    wire.turn += 1
    n, name, readme, repo = wire.turn, f"{verb}{wire.turn}", wire.path / "README", wire.repo
    job, text, new = "", b"%d " % n * 5000, os.urandom(40).hex().encode()
    if verb in ("new", "push"):  # something to upload
        repo.save("n", b"%d\n" % n)
    elif verb in ("rename", "rm"):
        repo.new(name, host=wire.host)
    elif verb in ("logs", "wait", "stop"):
        job = repo.job("sleep 600" if verb == "stop" else "echo one; echo two; exit 9", host="far")
        assert verb == "stop" or repo.cli(f"wait {job}").code == 9
    if verb != "push":  # which would refuse
        readme.write_bytes(new if verb == "pull" else b"old\n" * 9)
    line = {"new": f"new -H {wire.host} {name}", "exec": "exec -w main --", "read": "read README", "write": "write README", "edit": "edit README --count 9 --old old --new beta",
            "glob": "glob src/*", "grep": "grep main", "push": "push -w main" + " --force" * (wire.host == "far"), "pull": "pull -w main", "diff": "diff -w main",
            "fork": f"fork -w main {name}", "rename": f"rename -w {name} {name}x", "rm": f"rm {name}"}.get(verb, f"{verb} {job}").split()
    stdin = {"write": text, "batch": b'{"id": 1, "workspace": "main", "tool": "exec", "arguments": {"command": "echo in; exit 3"}}\n'}.get(verb)
    right = {"exec": lambda a: a.out == b"".join(b"line %d\n" % i for i in range(300)) and a.err == b"err\n", "logs": lambda a: a.out == b"one\ntwo\n",
             "edit": lambda a: readme.read_bytes() == b"beta\n" * 9, "write": lambda a: readme.read_bytes() == text, "read": lambda a: a.out == b"old\n" * 9,
             "batch": lambda a: a.json["ok"] is True and a.json["result"]["exit_code"] == 3 and a.json["result"]["stdout"] == "in\n",
             "push": lambda a: tree_of(wire.path) == repo.tree(), "pull": lambda a: repo.pulled("README") == new.decode(), "diff": lambda a: b"+old" in a.out,
             "new": lambda a: tree_of(repo.path(name)) == repo.tree(), "fork": lambda a: tree_of(repo.path(name)) == tree_of(wire.path),
             "rename": lambda a: {name, name + "x"} & set(repo.workspaces()) == {name + "x"}, "rm": lambda a: name not in repo.workspaces()}.get(verb, lambda a: True)
    if verb == "exec":
        line.append("i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done; echo err >&2; exit 7")
    return line, stdin, {"exec": 7, "wait": 9}.get(verb, 0), right


def honest(answer, verb, code, right, where):
    """Success is success; else the line was lost, and one sentence says so. True when it succeeded."""
    if verb == "batch" and answer.out and not answer.json["ok"]:
        assert answer.code == 1 and answer.json["error"]["message"], (where, answer)
        return False
    if answer.code == code:
        assert right(answer), (where, answer)
        return True
    assert answer.code == 255 and answer.said.count("\n") <= 2 and answer.said.strip(), (where, answer)
    return False


VERBS = ("new", "exec", "read", "write", "edit", "glob", "grep", "jobs", "logs", "wait", "stop", "push", "pull", "diff", "fork", "rename", "rm", "batch")


ONCE = ("new", "edit", "fork", "rename", "rm")  # a second such call is refused


def worn(site, verb, luck):
    """One kind of operation, killed 36 times in a project of its own. After each few kills the same call succeeds, or has been done."""
    lane, took = Wire(site, "box", name=f"lane-{verb}", files={"nonce": verb.encode(), **{f"d/{n}": b"%d\n" % n for n in range(20)}}), 0.0
    for group in range(7):
        words, stdin, code, right = case(lane, verb)
        for _ in range(6 if group else 0):
            before = slurp(lane.path / "README")
            with tempfile.TemporaryFile() as spool:
                spool.write(stdin or b"")
                spool.seek(0)
                child = lane.repo.start(*words, stdin=spool)
            with suppress(subprocess.TimeoutExpired):
                child.wait(luck.uniform(0.03, took * 1.2))
            killed(child)
            assert verb != "write" or slurp(lane.path / "README") in (before, stdin), "old or new, never a mix"
        final = lane.repo.cli(*words, stdin=stdin)
        assert (final.code == code or group and final.code == 1 and verb in ONCE) and right(final), (verb, group, final)
        took = took or final.seconds
    return lane


@slow
@promise(7)
def test_killed_at_any_instant_a_few_hundred_times(site):
    seed = int(os.environ.get("CMUX_TEST_SEED", "0")) or random.randrange(1, 10 ** 6)
    print(f"CMUX_TEST_SEED={seed}")
    lanes = at_once(3, lambda verb: worn(site, verb, random.Random(f"{verb} {seed}")), ("new", "push", "write", "edit", "pull", "rm", "fork", "rename"))
    for lane in lanes:
        listed = lane.repo.workspaces()
        lane.repo.ok("exec --all --json --", "git status --short")
        assert {p.name for p in lane.path.parent.iterdir()} == set(listed), (lane.repo.dir, seed)
        lane.repo.ok("push -w", sorted(listed)[0], "--force")  # a change: what the killed left is swept
    assert len(lanes) * 36 == 288
    settled(site)


@slow
@each("verb", VERBS)
def test_the_line_cut_after_any_number_of_bytes(wire, verb):
    words, stdin, code, right = case(wire, verb)
    quiet, moved = wire.measure(words, stdin)
    assert honest(quiet, verb, code, right, "undisturbed")
    hits = 0
    for way, whole_way in moved.items():
        for part in range(4):
            at = max(1, whole_way * (2 * part + 1) // 8)
            words, stdin, code, right = case(wire, verb)
            first, sprung = wire.struck(words, stdin, way, at, wire.line.drop)
            where = (verb, way, at, whole_way)
            hits += sprung
            assert sprung or first.code == code, (where, first)
            succeeded = honest(first, verb, code, right, where)
            if not succeeded or verb not in ONCE:
                again = wire.repo.cli(*words, stdin=stdin)
                if again.code == 1 and verb in ONCE:
                    assert right(again), (where, first, again)  # it was done: the answer alone was lost
                else:
                    assert honest(again, verb, code, right, where), (where, first, again)
    assert hits >= 5 and wire.repo.ok("list --json")


@slow
@each("how", [SIGKILL, SIGSTOP])
@each("verb", ["new", "exec", "write", "push", "pull", "fork", "logs"])
def test_masters_killed_or_stopped_in_the_middle(wire, verb, how):
    words, stdin, code, right = case(wire, verb)
    quiet, moved = wire.measure(words, stdin)
    assert honest(quiet, verb, code, right, "undisturbed")
    for way in ("up", "down"):
        struck = []

        def strike(struck=struck):
            for process in processes(False):  # masters, and the connections that carry one stream
                if os.fsencode(wire.site.dir) in process.cmdline and re.match(rb"(\S*/)?ssh[:\0 ]", process.cmdline):
                    struck.append(process.pid)
                    kill(process.pid, how)
            if how == SIGSTOP:
                Timer(1.0, lambda: [kill(pid, SIGCONT) for pid in struck]).start()
        for part in (3, 9, 27, 81):  # many small packets one time are a few the next: the trap may lie beyond the end
            words, stdin, code, right = case(wire, verb)
            first, sprung = wire.struck(words, stdin, way, max(1, moved[way] // part), strike)
            if sprung:
                break
            assert honest(first, verb, code, right, (verb, way, "not struck"))
        assert sprung and struck
        succeeded = honest(first, verb, code, right, (verb, way, how))
        assert succeeded or how == SIGKILL
        if not succeeded:
            assert honest(wire.repo.cli(*words, stdin=stdin), verb, code, right, (verb, way, "again"))


def test_sshd_restarted_under_running_commands_and_jobs(repo, site, nap):
    job = repo.job("while [ ! -e go ]; do sleep 0.05; done; echo done; exit 9")
    child = repo.start("exec --", f"echo early; {nap}")
    assert child.stdout.readline() == b"early\n"
    waiting = repo.start(f"wait {job}")
    site.restart()
    ran = child.end()
    assert ran.code == 255 and "lost" in ran.said
    assert repo.exec("echo again").out == b"again\n"
    nap.gone()
    assert [row["state"] for row in repo.cli("jobs --json").json] == ["running"]
    (repo.path() / "go").touch()
    assert waiting.end().code == 9 and repo.cli(f"logs {job}").out == b"done\n"


def test_an_hour_asleep_is_a_lost_line_and_jobs_go_on(site, repo, nap):
    site.daemon("drowsy", "ClientAliveInterval 1", "ClientAliveCountMax 2")
    repo.new(host="drowsy")
    job = repo.job("echo one; until [ -e go ]; do sleep 0.05; done; echo two; exit 9", host="drowsy")
    command, following, waiting = repo.start("exec --", f"echo early; {nap}"), repo.start(f"logs -f {job}"), repo.start(f"wait {job}")
    for child, line in ((command, b"early\n"), (following, b"one\n")):
        assert child.stdout.readline() == line
    until(lambda: len(site.log("drowsy").split("Starting session")) > 5)
    asleep = [p.pid for p in site.masters()] + [command.pid, following.pid, waiting.pid]
    for pid in asleep:
        kill(pid, SIGSTOP)
    until(lambda: re.search(r"(?i)timeout,? client not responding|Timeout before|client not responding", site.log("drowsy")))
    (repo.path() / "go").touch()
    nap.gone()
    for pid in asleep:
        kill(pid, SIGCONT)
    ran = command.end()
    assert ran.code == 255 and "lost" in ran.said
    assert waiting.end().code == 9 and following.end().ended[:2] == (0, b"two\n")
    assert repo.exec("echo again", host="drowsy").out == b"again\n"


# === Liars: a host that says what it likes (promise 3) ===


# Stands in for a login shell, or for ssh itself. An operation whose header names lie-N is answered with the
# N-th attack of the file; any other goes to an honest sh.
LIAR = r"""
import json, os, re, subprocess, sys, time
command = os.environ.get("SSH_ORIGINAL_COMMAND") or sys.argv[-1]
header, nonce, name = b"", b"", b""
def line():
    global header
    start = len(header)
    while not header.endswith(b"\n") or len(header) == start:
        byte = os.read(0, 1)
        if not byte:
            os._exit(0)
        header += byte
    return header[start:]
if not command.startswith("exec sh -c"):
    os.execvp("sh", ["sh", "-c", command])
while name != b".":
    name, count = line().split()
    value = b"".join([line() for _ in range(int(count))])
    nonce = value.strip() if name == b"_cmux_nonce" else nonce
lie = re.search(rb"lie-(\d+)", header)
if not lie:
    ours, theirs = os.pipe()
    if os.fork():  # the honest sh is this very process, so that its pid is; the child feeds it
        os.dup2(ours, 0), os.close(ours), os.close(theirs)
        os.execvp("sh", ["sh", "-c", command])
    os.close(ours), os.close(1), os.close(2)
    data = header
    while data:
        try:
            os.write(theirs, data)
        except OSError:
            os._exit(0)
        data = os.read(0, 65536)
    os._exit(0)
with open(os.environ["CMUX_LIAR"]) as file:
    attack = json.load(file)[int(lie.group(1))]
for kind, fd, value in attack:
    if kind == "say":
        data = value.encode("latin-1").replace(b"{N}", nonce)
        while data:
            data = data[os.write(fd, data):]
    elif kind == "flood":
        end, chunk = time.time() + 20, (value * (65536 // len(value))).encode("latin-1").replace(b"{N", nonce[:-1])
        while time.time() < end:
            os.write(fd or 1, chunk)
            if fd == 0:
                os.write(2, chunk)
    elif kind == "wait":
        time.sleep(value)
    elif kind == "exit":
        os._exit(value)
"""


def says(out="", err="", status=0):
    return [("say", 1, "{N}+ 77\n"), ("say", 2, "{N}+ 77\n"), ("say", 1, out), ("say", 2, err),
        ("say", 1, "{N}- %s\n" % status), ("say", 2, "{N}- %s\n" % status)]


BEGUN = says()[:2]


ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x07\x1b[2J\x1b[6n\x9b31m\xc2\x9b31m\r\x08\x7f\xe2\x80\xae\xe2\x81\xa6\x1bP+q\x1b\\\x0e"


ATTACKS = {
    "nothing": [], "nothing, 255": [("exit", 0, 255)], "noise only": [("say", 1, "Host key verification failed.\n"), ("say", 2, ESCAPES)],
    "another nonce": [(k, f, v.replace("{N}", "f" * 32)) if k == "say" else (k, f, v) for k, f, v in says("x")], "a mark cut off": [("say", 1, "{N}")],
    "begun, no end": BEGUN, "an end without a beginning": says()[4:], "an end on one stream only": BEGUN + [("say", 1, "{N}- 0\n")],
    "the refusal 0": [("say", 1, "{N}x 0\n"), ("say", 2, "{N}x 0\n")], "the refusal -1": [("say", 1, "{N}x -1\n"), ("say", 2, "{N}x -1\n")],
    "the refusal 96": [("say", 1, "{N}x 96\n"), ("say", 2, "{N}x 96\n")],
    "status 256": says("x", status=256), "status -1": says("x", status=-1), "status 1e9": says("x", status=10**9), "no status": says("x", status=""),
    "a word for a status": says("x", status="zero"), "5000 digits for a status": says("x", status="9" * 5000), "two ends": says("x") + says("y")[4:],
    "an empty answer": says(), "random bytes": says("".join(map(chr, range(256))) * 40), "NUL bytes": says("\0" * 5000),
    "5000 digits": says("9" * 5000 + " all\n" + "x"), "digits that are none": says("\xc2\xb2 all\nj0123abcd \xc2\xb2 exited \xc2\xb2\n"),
    "a negative length": says("-5 all\n"), "a length of a terabyte": says("1099511627776 lines\nx"), "exit 256 of a job": says("j0123abcd 5 exited 256\n5 exited 256\n"),
    "a wrong state": says("5 exited\nj0123abcd 5\n"), "deep JSON": says("[" * 100000), "surrogates": says("\xed\xa0\x80 all\n\xed\xa0\x80"),
    "escapes in a failure": says(ESCAPES, ESCAPES, 3), "every status": says("", ESCAPES, 22), "a status of no meaning": says("", "no newline", 99),
    "3 MB of JSON": says('{"a": [1]}' * 300000), "the line hangs up in the answer": BEGUN + [("say", 1, "12 all\nab"), ("exit", 0, 255)],
}


FLOODS = {
    "stdout": BEGUN + [("flood", 1, "y\n")], "stderr": BEGUN + [("flood", 2, "y\n")], "both": BEGUN + [("flood", 0, "y\n")], "no newline": BEGUN + [("flood", 1, "y")],
    "half marks": BEGUN + [("flood", 1, "{N")], "a mark without an end": BEGUN + [("say", 1, "{N}"), ("flood", 1, "-")],
}


class Liar:
    """A host that lies about workspaces called lie-N and is honest about others: a real sshd with a hostile login shell."""

    def __init__(self, site):
        self.site, self.spec, liar = site, site.dir / "attacks", site.dir / "liar.py"
        liar.write_text(LIAR)
        shell = site.script("liar-shell", f'CMUX_LIAR={self.spec} exec {sys.executable} -I -S {liar} "$@"')
        site.daemon("liar", f"ForceCommand {shell}")
        self.repo = Repo(site)
        self.repo.new(host="liar")

    def lies(self, *attacks):
        """A workspace for each attack: copies of an honest one's entry in the registry of this machine."""
        self.spec.write_text(json.dumps(attacks))
        names = [f"lie-{n}" for n in range(len(attacks))]
        with self.repo.amended() as record:
            main = record["workspaces"]["main"]
            record["workspaces"].update({name: dict(main, path=main["path"][:-4] + name, op=name) for name in names})
        return names


CALLS = [
    ("exec", {"command": "true", "timeout": 20}), ("exec", {"command": "cat", "stdin": "x" * 100000, "timeout": 20}), ("exec", {"command": "true", "background": True}),
    ("read", {"path": "README"}), ("read", {"path": "README", "limit": 5}), ("write", {"path": "README", "content": "x" * 300000}),
    ("edit", {"path": "README", "edits": swap("hello", "x")}), ("glob", {"pattern": "**"}), ("grep", {"pattern": "x"}), ("jobs", {}),
    ("logs", {"job": "j0123abcd"}), ("wait", {"job": "j0123abcd", "timeout": 1}), ("stop", {"job": "j0123abcd"})]


def sane(answer, what):
    text = json.dumps(answer)
    assert answer["ok"] or answer["error"]["type"] not in ("Bug", ""), (what, text[:2000])
    if not answer["ok"]:
        said = answer["error"]["message"]
        assert len(said) < 1000 and not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]", said), (what, text[:2000])


@slow
@promise(3)
def test_no_forged_answer_of_a_host_is_a_traceback_or_an_unbounded_error(site):
    liar = Liar(site)
    names = dict(zip(liar.lies(*ATTACKS.values()), ATTACKS))
    with Agent(liar.repo, "-j 16") as talker:
        for name, what in names.items():
            for tool, arguments, number in [(tool, arguments, talker.post(tool, arguments, workspace=name)) for tool, arguments in CALLS]:
                answer = talker.answer(number, 60)
                sane(answer, f"{tool} against {what}")
                if tool == "exec" and answer["ok"] and "status" in what:
                    assert arguments.get("background") or 0 < answer["result"]["exit_code"] < 256, (what, answer)
                if tool == "wait" and answer["ok"]:
                    assert answer["result"]["exit_code"] in (None, *range(256)), (what, answer)
        assert talker("exec", command="echo honest")["stdout"] == "honest\n"
    assert {"main", *names} == set(liar.repo.workspaces())


@each("tool", ["wait", "logs -f"])
def test_a_host_that_ends_long_polls_at_once_is_not_asked_at_once(site, tool):
    liar = Liar(site)
    (name,) = liar.lies(says("0 j0123abcd running\n"))
    sessions = lambda: site.log("liar").count("Starting session")  # noqa: E731
    before, child = sessions(), liar.repo.start(*tool.split(), "j0123abcd", "-w", name)
    until(lambda: sessions() > before, "it asks")
    sleep(4)
    child.send_signal(SIGINT)
    child.communicate()
    assert sessions() - before < 11


@slow
def test_no_forged_answer_to_a_pull_is_taken(site):
    liar, result = Liar(site), b"\n%s\n%s\0%s\n" % tuple(one(b"x"))
    heads = [b"git 2 " + HOSTS_BASE, b"git 1 zz", b"git 0 " + b"1" * 39, b"git 0 " + b"1" * 65, b"GIT 0 " + HOSTS_BASE, b"files x", b"files", b"all", b"note", b"large", b"\0", b""]
    lies = [*ATTACKS.values(), *(says((head + result).decode()) for head in [*heads, b"note " + b"x" * 9000, b"git 0 " + HOSTS_BASE])]
    names, before = liar.lies(*lies), untouched(liar.repo)
    told = json.loads(in_library(liar.repo, """
import json
project = Project(".")
cmux_ssh.START_PATIENCE = cmux_ssh.CALL_PATIENCE = 2
def look(name):
    told = [raised(lambda: call(project.workspace(name))) for call in (
        pull, lambda place: list(diff(place)), lambda place: project.remove(place.name), lambda place: project.push(place.name))]
    return [str(answer) if isinstance(answer, CmuxError) else "taken" for answer in told]
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(look, sys.argv[1:]))))
""", *names, seconds=240))
    assert told[-1][:2] == ["taken"] * 2 and untouched(liar.repo) == before
    assert not [said for said in told[:-1] if "taken" in said[:2] or not all(len(text) < 1000 and text.isprintable() for text in said)]
    assert liar.repo.git("for-each-ref --format=%(refname:short) refs/heads/cmux") == f"cmux/{names[-1]}"


@slow
@each("flood", FLOODS)
@promise(3)
def test_a_host_that_floods_is_cut_off_in_little_memory(site, flood):
    liar = Liar(site)
    name = liar.lies(FLOODS[flood])[0]
    with Agent(liar.repo, "-j 16") as talker:
        began = monotonic()
        asked = [(tool, talker.post(tool, dict(arguments, timeout=2) if tool == "exec" and "background" not in arguments else arguments, workspace=name))
            for tool, arguments in CALLS]
        for tool, number in asked:
            answer = talker.answer(number, 60)
            sane(answer, f"{tool} against {flood}")
            assert not answer["ok"] or tool == "exec" and answer["result"]["timed_out"], (tool, answer)
        assert monotonic() - began < 45
        assert peak(talker.child.pid) < 200, "megabytes"
        assert talker("exec", command="echo honest")["stdout"] == "honest\n"


def test_rm_removes_an_unfinished_workspace(repo):
    repo.new()
    file = repo.record()
    record = json.loads(file.read_text())
    path, entry = repo.path(), record["workspaces"]["main"]
    entry["state"] = "creating"
    file.write_text(json.dumps(record))
    refused(repo.cli("rm -H far main"), 2, "not on far")
    repo.ok("rm -H box main")
    assert not repo.workspaces() and not path.exists()
    path.mkdir()
    file.write_text(json.dumps(record))
    repo.ok("rm main")
    assert path.is_dir(), "it is somebody else's"


def test_mcp_a_failing_secret_command(repo):
    repo.new()
    ran = repo.dir.parent / "ran"
    repo.secret("TOK", command="echo ran >>%s; exit 1" % ran)
    with Mcp(repo) as mcp:
        failed, text = mcp.call("write", path="f", content="hello")
        assert failed and "may have been done" in text and "TOK" in text and (repo.path() / "f").read_text() == "hello"
        text = mcp.refusal("read", path="README")
        assert "hello" not in text and "TOK" in text
    assert ran.read_text() == "ran\n"


def test_a_glob_takes_time_linear_in_the_names(area):
    dice, took = random.Random(1), []
    names = ["/".join("".join(dice.choice("ab") for _ in range(240)) for _ in range(4)) for _ in range(400)]
    for name in names:
        area.put(name, b"")
    for pattern, chosen in (("**/*", names), ("**/*a" + "?" * 40, [name for name in names if name[-41] == "a"]), ("**/*a*a*a*a*a*a[c]", [])):
        took.append(monotonic())
        found = area.talker("glob", pattern=area.p(pattern))["paths"]
        took[-1] = monotonic() - took[-1]
        assert found == sorted(map(area.p, chosen)) and took[-1] < 5 * took[0] + 1, (pattern, took)
