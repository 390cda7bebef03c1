#!/usr/bin/env python3
"""pytest with its tests in several processes: python .ci/parallel.py [pytest's arguments].

Every test has its own sshd and mostly waits, so a few processes share two cores well. This process
collects the tests, hands them out one by one (slow ones first), and reports what comes back as if it had run
them itself: -x, -k, -v, --durations and the closing lines are pytest's own. Tests marked `alone` (they
measure time, memory or the whole machine) run last, here, with nothing beside them.
CMUX_TEST_WORKERS says how many processes; 0 or 1: none but this one. Warnings of workers are not relayed.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

CHANNEL = "CMUX_TEST_CHANNEL"  # in a worker's environment: the descriptors it reads tests from and reports to
AHEAD = 2  # tests a worker has at a time: the one it runs, and the next, which says what fixtures to keep


def read_all(pipe):
    """What the other side pickled, until it is gone."""
    while True:
        try:
            yield pickle.load(pipe)
        except (EOFError, pickle.UnpicklingError):
            return


class Worker:
    """A pytest that runs what it is told; its own output matters only if it dies."""

    def __init__(self, answers):
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        self.todo = []
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
            start_new_session=True, pass_fds=(orders, reports), env={**os.environ, CHANNEL: "%d %d" % (orders, reports)})
        os.close(orders)
        os.close(reports)
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers):
        with open(self._reports, "rb") as reports:
            for report in read_all(reports):
                answers.put((self, report))
        answers.put((self, None))

    def order(self, item):
        """The next test to run; None: no more."""
        self.todo += [item] if item else []
        try:
            os.write(self._orders, pickle.dumps(item and item.nodeid))
        except OSError:
            pass  # it died; its end is reported

    def close(self):
        os.close(self._orders)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_words(self):
        self.output.seek(0)
        return "its worker ended with %s:\n%s" % (self.process.wait(), self.output.read()[-8000:].decode(errors="replace"))


def replay(session, item, reports):
    hook = session.config.hook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    for stop in (session.shouldfail, session.shouldstop):
        if stop:
            raise (session.Failed if stop is session.shouldfail else session.Interrupted)(stop)


def together(session, items, count):
    """Run items in count workers; returns when all have reported, also for those that died."""
    waiting = sorted(items, key=lambda item: "slow" not in item.keywords)
    answers, hook = queue.Queue(), session.config.hook
    workers = living = [Worker(answers) for _ in range(count)]

    def feed(worker):
        worker.order(waiting.pop(0) if waiting else None)

    def failed(item, words):
        replay(session, item, [pytest.TestReport(item.nodeid, item.location, {}, "failed", words, "call")])

    try:
        for worker in workers * AHEAD:
            feed(worker)
        while any(worker.todo for worker in living):
            worker, reports = answers.get()
            if reports is not None:
                replay(session, worker.todo.pop(0),
                       [hook.pytest_report_from_serializable(config=session.config, data=data) for data in reports])
                feed(worker)
            elif worker.todo:
                living = [other for other in living if other is not worker]
                for item in worker.todo + (waiting if not living else []):
                    failed(item, worker.last_words())
    except BaseException:
        for worker in workers:
            worker.process.send_signal(signal.SIGINT)  # ends the test it runs, and its fixtures
        raise
    finally:
        for worker in workers:
            worker.close()


def as_told(session, items, orders, reports):
    """A worker's part."""
    names, hook, said = {item.nodeid: item for item in items}, session.config.hook, []

    class Listener:
        def pytest_runtest_logreport(self, report):
            said.append(hook.pytest_report_to_serializable(config=session.config, report=report))

    session.config.pluginmanager.register(Listener())
    for channel in (orders, reports):
        os.set_inheritable(channel, False)
    with open(orders, "rb") as told, open(reports, "wb") as out:
        following = (name and names[name] for name in read_all(told))  # KeyError: a name that is another in each process
        item = next(following, None)
        while item:
            after = next(following, None)
            hook.pytest_runtest_protocol(item=item, nextitem=after)
            pickle.dump(said, out)
            out.flush()
            said.clear()
            item = after


def pytest_configure(config):
    if CHANNEL in os.environ:
        config.workerinput = {}  # what tells pytest's own plugins, as xdist does, to write no files


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if session.testsfailed or session.config.option.collectonly:
        return None
    if CHANNEL in os.environ:
        as_told(session, session.items, *map(int, os.environ.pop(CHANNEL).split()))
        return True
    items = [item for item in session.items if "alone" not in item.keywords]
    count = min(int(os.environ.get("CMUX_TEST_WORKERS") or (os.cpu_count() or 1) + 2), len(items) // 3)
    if count < 2 or session.config.option.capture == "no" or session.config.option.usepdb:
        return None
    together(session, items, count)
    alone = [item for item in session.items if "alone" in item.keywords]
    for item, after in zip(alone, [*alone[1:], None]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
    return True


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[sys.modules[__name__]]))
