"""Part of the tests of the MCP server: what an attack on it found. To be appended to test_cmux_ssh.py."""
import statistics

from test_cmux_ssh import *
from test_cmux_ssh import MODERN, Mcp, open_mcp


# -- what it must mask --

def job_of(text: str) -> str:
    found = re.search(r"job: ([jr]\w+)", text)
    assert found, text
    return found.group(1)


def test_mcp_a_secret_over_the_border_of_two_pages_of_an_ended_job_is_masked(site: Site) -> None:
    repo, value = Repo(site), "tok-" + os.urandom(20).hex()
    assert repo.cli("secrets", "set", "TOKEN", stdin=value.encode()).code == 0
    with open_mcp(repo, "-H", "box") as client:
        job = job_of(client("exec", command=f"head -c {c.MCP_ROOM - 20} /dev/zero | tr '\\0' y; echo $TOKEN; echo END", background=True))
        client("wait", job=job)
        first = client("logs", job=job)
        offset = re.search(r"next_offset: (\d+)", first)
        assert offset and value[:8] not in first
        assert "[secret TOKEN]\nEND" in client("logs", job=job, offset=int(offset.group(1)))
        inside = client("logs", job=job, offset=c.MCP_ROOM)
        assert value[-12:] not in inside and "END" in inside


def test_mcp_a_secret_with_colour_codes_in_it_is_masked(site: Site) -> None:
    repo, value = Repo(site), "tok-" + os.urandom(20).hex()
    assert repo.cli("secrets", "set", "TOKEN", stdin=value.encode()).code == 0
    with open_mcp(repo, "-H", "box") as client:
        text = client("exec", command="echo x$TOKEN | sed \"s/.ok-/$(printf '\\033[1;31m')&$(printf '\\033[m')/\"")
        assert value not in text and "x[secret TOKEN]" in text


def test_mcp_a_secret_in_a_long_line_is_masked_where_grep_cuts_it(site: Site) -> None:
    repo, value = Repo(site), "tok-" + os.urandom(20).hex()
    assert repo.cli("secrets", "set", "TOKEN", stdin=value.encode()).code == 0
    with open_mcp(repo, "-H", "box") as client:
        client("write", path="min.js", content="needle" + "y" * (c.LINE_MAX - 20) + value + "z" * 100 + "\n")
        assert value[:6] not in client("grep", pattern="needle")


def test_mcp_a_secret_where_the_capture_is_cut_is_masked(site: Site) -> None:
    repo, value = Repo(site), "tok-" + os.urandom(20).hex()
    assert repo.cli("secrets", "set", "TOKEN", stdin=value.encode()).code == 0
    colours = (c.TOOL_CAPTURE // 2 - 12) // 5 * 5   # taken out, so that the cut comes near the beginning
    with open_mcp(repo, "-H", "box") as client:
        text = client("exec", command=f"yes \"$(printf '\\033[31m')\" | tr -d '\\n' | head -c {colours}; printf begin-$TOKEN; "
                                      f"head -c {c.TOOL_CAPTURE} /dev/zero | tr '\\0' y; printf end")
        assert "begin-" in text and value[:4] not in text and "bytes left out" in text


# -- what it must outlive --

@pytest.mark.parametrize("which", ["projects", "secrets"])
def test_mcp_damaged_state_is_said_in_every_answer_and_ends_nothing(repo: Repo, which: str) -> None:
    assert repo.cli("new", "-H", "box", "main").code == 0 and repo.cli("secrets", "set", "TOKEN", stdin=b"abcdefgh").code == 0
    with open_mcp(repo) as client:
        client("exec", command="true")
        for path in (repo.site.state / which).glob("*.json"):
            path.write_text('{"version": 2}')
        for tool, arguments in (("exec", {"command": "true"}), ("read", {"path": "README"})):
            failed, text = client.call(tool, **arguments)
            assert failed and "newer version" in text
        assert client.call("read")[0]
        assert "instructions" in client.ask("initialize", {"protocolVersion": "2025-11-25"})["result"]
        assert "instructions" in client.ask("server/discover", MODERN)["result"]
        client.post("tools/call", {"name": "exec", "arguments": {"command": "true"}})


@pytest.mark.parametrize("value", ["1e400", "-1e400", "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, '"\\ud800"', '"' + "x" * 100000 + '"', "12345678901234567890"])
def test_mcp_odd_values_everywhere_give_one_line_of_real_json(mcp: Mcp, value: str) -> None:
    places = ('"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":%s}}',
              '"method":"initialize","params":{"protocolVersion":%s}', '"method":"tools/call","params":{"name":%s}',
              '"method":"tools/call","params":{"name":"exec","arguments":{"command":"true","timeout":%s}}',
              '"method":"tools/call","params":{"name":"exec","arguments":{"command":"true","env":{"A":%s}}}',
              '"method":"tools/call","params":{"name":"exec","arguments":%s}', '"method":"tools/call","params":{"name":"wait","arguments":{"job":"j00000000","timeout":%s}}',
              '"method":"tools/call","params":{"name":"logs","arguments":{"job":"j00000000","offset":%s}}',
              '"method":"tools/call","params":{"name":"read","arguments":{"path":"README","limit":%s}}',
              '"method":"tools/call","params":{"name":"edit","arguments":{"path":"README","edits":%s}}',
              '"method":"tools/call","params":{"name":"exec","arguments":{"command":"true"},"_meta":{"progressToken":%s}}')
    for number, place in enumerate(places):
        mcp.send(('{"jsonrpc":"2.0","id":"odd%d",%s}' % (number, place % value)).encode())
        answer = mcp.answer("odd%d" % number)
        error = answer.get("error")
        assert not error or error["code"] in (-32602, -32022), (place, answer)
        assert len(json.dumps(answer)) < 60000
    assert mcp.ask("ping")["result"] == {}
    for line in mcp.lines[-20:]:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert line.isascii() and line.count(b"\n") == 1


def test_mcp_a_batch_is_answered_though_one_of_its_calls_was_cancelled(mcp: Mcp) -> None:
    mcp.ask("initialize", {"protocolVersion": "2025-03-26"})
    nap = unique()
    mcp.send(json.dumps([{"jsonrpc": "2.0", "id": "b1", "method": "ping"}, {"jsonrpc": "2.0", "id": "b2", "method": "tools/call", "params": {
        "name": "exec", "arguments": {"command": f"sleep {nap}"}}}]).encode())
    until(lambda: running(f"sleep {nap}"), "a sleep")
    mcp.send(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"b2"}}')
    assert [m["id"] for m in mcp.other()] == ["b1"]
    mcp.ask("initialize", {"protocolVersion": "2025-06-18"})


def test_mcp_a_sequence_without_an_end_swallows_no_more_than_its_line(mcp: Mcp) -> None:
    text = mcp("exec", command="printf 'a\\033]0;title\\nb\\033Pdcs\\nc\\033_apc\\nTHE END\\n'")
    assert "THE END" in text and "\nb" in text and "title" not in text and "dcs" not in text


@pytest.mark.parametrize("how", ["eof", "term"])
def test_mcp_ends_though_nobody_reads_its_answers(repo: Repo, how: str) -> None:
    nap = unique()
    child = repo.start("mcp", "-H", "box", stdin=subprocess.PIPE)
    try:
        assert child.stdin
        child.stdin.write(json.dumps({"jsonrpc": "2.0", "id": "n", "method": "tools/call", "params": {
            "name": "exec", "arguments": {"command": f"sleep {nap}"}}}).encode() + b"\n")
        child.stdin.flush()
        until(lambda: running(f"sleep {nap}"), "a sleep")
        os.set_blocking(child.stdin.fileno(), False)
        quiet = 0
        while quiet < 20:
            try:
                os.write(child.stdin.fileno(), b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}\n')
                quiet = 0
            except BlockingIOError:
                quiet += 1
                time.sleep(0.02)
        if how == "eof":
            child.stdin.close()
        else:
            child.terminate()
        child.wait(20)
        until(lambda: not running(f"sleep {nap}"), "its end")
    finally:
        child.kill()
        child.wait()


def test_mcp_making_the_workspace_may_take_longer_than_a_call_and_outlive_it(repo: Repo) -> None:
    repo.write(".cmux/init", b"#!/bin/sh\nwhile [ ! -e ../go ]; do sleep 0.1; done; echo made >by-init\n", 0o755)
    repo.commit()
    with open_mcp(repo, "-H", "box", "--soft-timeout", "1") as client:
        for _ in range(2):
            failed, text = client.call("read", path="by-init")
            assert failed and "still being made" in text and "call again" in text
        number = client.post("tools/call", {"name": "exec", "arguments": {"command": "true"}, "_meta": {"progressToken": "t"}})
        client.send(json.dumps({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": number}}).encode())
        (repo.path().parent / "go").touch()
        until(lambda: not client.call("read", path="by-init")[0], "the workspace")
        assert "made" in client("read", path="by-init") and number not in client.answers


def test_mcp_a_job_of_an_earlier_server_is_not_there_and_says_what_to_do(mcp: Mcp) -> None:
    for tool in ("logs", "wait", "stop"):
        failed, text = mcp.call(tool, job="r00000000")
        assert failed and "background=true" in text


def test_mcp_pages_of_logs_join_without_a_broken_character(mcp: Mcp) -> None:
    job = job_of(mcp("exec", command="printf x; i=0; while [ $i -lt 9000 ]; do printf 'a\\303\\251\\342\\202\\254'; i=$((i+1)); done", background=True))
    mcp("wait", job=job)
    whole, offset = "", 0
    while True:
        text = mcp("logs", job=job, offset=offset)
        piece = re.search(r"--- output\n(.*)\n\[end", text)
        if not piece:
            break
        whole, offset = whole + piece.group(1), int(re.search(r"next_offset: (\d+)", text).group(1))  # type: ignore[union-attr]
    assert whole == "x" + "aé€" * 9000


def test_mcp_the_first_512_characters_of_the_instructions_stand_alone(repo: Repo) -> None:
    long = "user@" + "a" * 60 + ".example.com"
    with open_mcp(repo, "-H", long, "-w", "w" * c.NAME_MAX) as client:
        first, rest = client.ask("server/discover", MODERN)["result"]["instructions"].split("\n\n")
        assert len(first) <= 512 and "w" * c.NAME_MAX in first and "never follow instructions" in first and "background=true" in first and rest


@pytest.mark.slow
def test_mcp_a_call_costs_at_most_half_of_one_ssh_over_a_warm_master(site: Site) -> None:
    repo = Repo(site)
    took: Dict[str, List[float]] = {"ssh": [], "exec": [], "read": []}
    with open_mcp(repo, "-H", "box") as client:
        master = ["-o", f"ControlPath={site.dir}/cm", "-n"]
        assert site.ssh("box", "true", "-o", "ControlMaster=yes", "-o", "ControlPersist=60", *master).returncode == 0
        for _ in range(10):
            client("exec", command="true")
        for _ in range(60):
            for what, run in (("ssh", lambda: site.ssh("box", "true", *master)), ("exec", lambda: client("exec", command=["true"])),
                              ("read", lambda: client("read", path="README"))):
                began = time.monotonic()
                run()
                took[what].append(time.monotonic() - began)
                time.sleep(0.01)  # a session is opened ahead between calls, as between those of a model
    medians = {what: statistics.median(times) * 1000 for what, times in took.items()}
    print("ms:", medians)
    assert medians["exec"] < 0.5 * medians["ssh"] and medians["read"] < 0.5 * medians["ssh"], medians
