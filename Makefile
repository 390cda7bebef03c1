# Everything here works from a clean clone with git, ssh, make and python3.
PYTHON  ?= python3
ARGS    ?=
WORKERS ?= 4
MARKS   ?= not slow

# One virtual environment for each kind and minor version of Python, so that test-compat reuses them.
VENV = .venv/$(shell $(PYTHON) -c 'import sys; print("%s-%d.%d" % ((sys.implementation.name,) + sys.version_info[:2]))')
HIGH = PATH="$$PATH:/usr/sbin:/sbin"

# need PROGRAMS,PACKAGES: root on Debian installs what is missing; anyone else is told what to install.
need = @missing=; for p in $(1); do $(HIGH) command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing:$$missing"; apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $(2); \
	else echo "missing:$$missing. Install the packages $(2) (or what your system calls them), then try again." >&2; exit 1; fi

help:  ## print what can be made
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

demo:  ## the whole flow against a throwaway sshd on this machine
	$(call need,ssh git sshd,openssh-client git openssh-server)
	$(PYTHON) cmux_ssh.py demo

test: $(VENV)/ok  ## the tests but for the slow ones, in WORKERS processes (make test ARGS="-k upload -x")
	$(call need,ssh git sshd zsh fish tcsh mksh ksh busybox dropbear tinysshd bsdtar unshare,openssh-client git openssh-server zsh fish tcsh mksh ksh busybox dropbear-bin tinysshd libarchive-tools util-linux)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "$(MARKS)" $(ARGS)

test-all:  ## all tests
	@$(MAKE) --no-print-directory test MARKS=

test-compat:  ## the tests marked compat under the oldest, the newest and PyPy of the Pythons found
	@.ci/pythons | while read -r py; do echo "=== $$py"; \
		$$py -W error -I -S cmux_ssh.py --version && \
		$(MAKE) --no-print-directory test PYTHON=$$py MARKS=compat </dev/null || exit 1; done

bench:  ## measure next to plain ssh, in one run (make bench ARGS="--quick")
	$(call need,ssh git sshd,openssh-client git openssh-server)
	$(PYTHON) .ci/bench.py $(ARGS)

lint: $(VENV)/lint-ok  ## ruff on the Python files, mypy --strict on the product
	$(VENV)/bin/ruff check cmux_ssh.py test_cmux_ssh.py .ci/bench.py .ci/picture.py
	$(VENV)/bin/mypy --strict cmux_ssh.py

picture:  ## draw .github/demo.svg from a real run of the demo
	$(call need,ssh git sshd,openssh-client git openssh-server)
	$(PYTHON) .ci/picture.py .github/demo.svg

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' cmux_ssh.py)
release:  ## tag this version, with its notes and the digest of the file; refuses a dirty tree
	@[ -z "$$(git status --porcelain)" ] || { echo "The tree is dirty: commit or stash first." >&2; exit 1; }
	@{ sed -n '/^## $(VERSION)/,/^## [0-9]/p' .github/CHANGELOG.md | sed '$${/^## /d;}'; } >.git/notes
	@[ -s .git/notes ] || { echo ".github/CHANGELOG.md has no section for $(VERSION)." >&2; exit 1; }
	@$(PYTHON) cmux_ssh.py --version >>.git/notes
	git tag -a --cleanup=verbatim -F .git/notes v$(VERSION)

clean:  ## remove what these targets made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache __pycache__

# Debian's python3 comes without ensurepip until python3-venv is there.
$(VENV)/ok:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { rm -rf $(VENV); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -yq --no-install-recommends python3-venv; \
		else echo "$(PYTHON) cannot make virtual environments: install python3-venv, then try again." >&2; exit 1; fi; }
	$(PYTHON) -m venv --clear $(VENV) && $(VENV)/bin/python -m pip install -q pytest pytest-xdist && touch $@

$(VENV)/lint-ok: $(VENV)/ok
	$(VENV)/bin/python -m pip install -q ruff mypy && touch $@

.PHONY: help demo test test-all test-compat bench lint picture release clean
