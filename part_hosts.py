from test_cmux_ssh import *
from test_cmux_ssh import PROGRAM, PATIENCE, BINARY, HARD, ODD_FILES, POSIX, Site, Repo, Line, Agent  # noqa: F401

# === Liars: a host that says what it likes ===

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
    nonce = value.strip() if name == b"_cN" else nonce
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

Steps = List[Tuple[str, int, Any]]


def says(out: str = "", err: str = "", status: object = 0) -> Steps:
    """An answer in the right frame: marks, these words, and that status."""
    return [("say", 1, "{N}+ 77\n"), ("say", 2, "{N}+ 77\n"), ("say", 1, out), ("say", 2, err),
            ("say", 1, "{N}- %s\n" % status), ("say", 2, "{N}- %s\n" % status)]


BEGUN = says()[:2]
ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x07\x1b[2J\x1b[6n\x9b31m\xc2\x9b31m\r\x08\x7f\xe2\x80\xae\xe2\x81\xa6\x1bP+q\x1b\\\x0e"
ATTACKS: Dict[str, Steps] = {
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
FLOODS: Dict[str, Steps] = {
    "stdout": BEGUN + [("flood", 1, "y\n")], "stderr": BEGUN + [("flood", 2, "y\n")], "both": BEGUN + [("flood", 0, "y\n")], "no newline": BEGUN + [("flood", 1, "y")],
    "half marks": BEGUN + [("flood", 1, "{N")], "a mark without an end": BEGUN + [("say", 1, "{N}"), ("flood", 1, "-")],
}


class Liar:
    """A host that lies about workspaces called lie-N and is honest about others, reached in one of two ways: a real
    sshd with a hostile login shell, or a program in the place of ssh that talks nonsense itself."""

    def __init__(self, site: Site, how: str = "sshd") -> None:
        self.site, self.spec, script, shell = site, site.dir / "attacks", site.dir / "liar.py", site.dir / "liar-shell"
        script.write_text(LIAR)
        shell.write_text(f"#!/bin/sh\nCMUX_LIAR={self.spec} exec {sys.executable} -I -S {script} \"$@\"\n")
        shell.chmod(0o755)
        site.daemon("liar", f"ForceCommand {shell}")
        if how == "ssh":
            fake = site.dir / "fake-ssh"
            fake.write_text(f'#!/bin/sh\nfor a in "$@"; do case $a in -G) exec ssh -F {site.config} "$@";;\n'
                            f'-M) echo "unsupported option ControlMaster" >&2; exit 255;; esac; done\n'
                            f'HOME={site.far_home("liar")}; export HOME; exec {shell} "$@"\n')
            fake.chmod(0o755)
            site.env["CMUX_SSH_COMMAND"] = str(fake)
        self.repo = Repo(site)
        made = self.repo.cli("new", "-H", "liar", "main")
        assert made.code == 0, made

    def lies(self, *attacks: Steps) -> List[str]:
        """A workspace for each attack: copies of an honest one's entry in the registry of this machine."""
        self.spec.write_text(json.dumps(attacks))
        names = [f"lie-{n}" for n in range(len(attacks))]
        file = next((self.site.state / "projects").glob("*.json"))
        record = json.loads(file.read_text())
        main = record["workspaces"]["main"]
        record["workspaces"].update({name: dict(main, path=main["path"][:-4] + name) for name in names})
        file.write_text(json.dumps(record))
        return names


CALLS: List[Tuple[str, Dict[str, Any]]] = [
    ("exec", {"command": "true", "timeout": 20}), ("exec", {"command": "cat", "stdin": "x" * 100000, "timeout": 20}), ("exec", {"command": "true", "background": True}),
    ("read", {"path": "README"}), ("read", {"path": "README", "limit": 5}), ("write", {"path": "README", "content": "x" * 300000}),
    ("edit", {"path": "README", "edits": [{"old": "hello", "new": "x"}]}), ("glob", {"pattern": "**"}), ("grep", {"pattern": "x"}), ("jobs", {}),
    ("logs", {"job": "j0123abcd"}), ("wait", {"job": "j0123abcd", "timeout": 1}), ("stop", {"job": "j0123abcd"})]


def peak(pid: int) -> int:
    """The most memory a process ever had, in megabytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", slurp(f"/proc/{pid}/status").decode()).group(1)) // 1024  # type: ignore[union-attr]


def sane(answer: Dict[str, Any], what: str) -> None:
    text = json.dumps(answer)
    assert answer["ok"] or answer["error"]["type"] not in ("Bug", ""), (what, text[:2000])
    if not answer["ok"]:
        assert len(answer["error"]["message"]) < 1000 and c.neutralise(answer["error"]["message"]) == answer["error"]["message"], (what, text[:2000])


@pytest.mark.parametrize("how", ["sshd", "ssh"])
def test_no_forged_answer_of_a_host_is_a_traceback_or_an_unbounded_error(site: Site, how: str) -> None:
    """Every tool against every lie: wrong and doubled marks, impossible statuses, lengths, numbers and states."""
    liar = Liar(site, how)
    names = dict(zip(liar.lies(*ATTACKS.values()), ATTACKS))
    with open_agent(liar.repo, "-j", "32") as talker:
        asked = [(what, tool, arguments, talker.post(tool, arguments, workspace=name)) for name, what in names.items() for tool, arguments in CALLS]
        for what, tool, arguments, number in asked:
            answer = talker.answer(number, 60)
            sane(answer, f"{tool} against {what}")
            if tool == "exec" and answer["ok"] and "status" in what:
                assert arguments.get("background") or answer["result"]["exit_code"] != 0, (what, answer)
            if tool == "wait" and answer["ok"]:
                assert answer["result"]["exit_code"] in (None, *range(256)), (what, answer)
        assert talker("exec", command="echo honest")["stdout"] == "honest\n"
    assert {"main", *names} == set(liar.repo.workspaces())
