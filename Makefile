.DEFAULT_GOAL := help
.PHONY: help demo test chaos fuzz molecule alerts compat lint clean

help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

demo:  ## The whole pipeline on this machine (SOUNDS=dir: your own MP3s; KEEP=1: leave the servers up)
	@tests/stack/bootstrap.sh demo && exec .venv/bin/python tests/stack/demo.py

test:  ## Everything that CI runs (REQUIRE_ALL=1: what cannot run fails; ONLY="lint unit")
	@tests/stack/bootstrap.sh test && exec .venv/bin/python tests/run.py $(ONLY)

chaos:  ## Everything that can go wrong does, by a seed (SEED=n MINUTES=n; DOSES=full, long, outages or deaths)
	@tests/stack/bootstrap.sh test && exec .venv/bin/python tests/chaos/campaign.py \
		$(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DOSES),--doses $(DOSES))

TARGET = tar
SECONDS = 3600
fuzz:  ## Broken input for one parser, guided by coverage (TARGET=tar SECONDS=3600; its targets: TARGET=help)
	@tests/stack/bootstrap.sh test && \
		.venv/bin/python -m pip install -q --disable-pip-version-check --upgrade --target .cache/atheris 'atheris>=3,<4' && \
		PYTHONPATH=.cache/atheris exec .venv/bin/python tests/worker/fuzz/guided.py $(TARGET) -max_total_time=$(SECONDS)

molecule:  ## The roles on test hosts with systemd (SCENARIO=redis: one of them); as root
	@tests/stack/bootstrap.sh test && exec molecule/run.sh $(if $(SCENARIO),test -s $(SCENARIO),all)

alerts:  ## Every alert on test hosts: what it is about is broken, and its runbook mends it; as root
	@tests/stack/bootstrap.sh test && ALERTS=all molecule/run.sh test -s alerts && cat .cache/molecule/alerts.md

compat:  ## The collection on ansible-core 2.17 and the newest, its modules by Python 3.9 (needs python3.9 and python3.12)
	@tests/stack/bootstrap.sh test && exec tests/modules/compat.sh

lint:  ## ruff, mypy and the imports between rooms
	@tests/stack/bootstrap.sh test && exec .venv/bin/python tests/run.py lint

clean:  ## Remove everything that make made here
	@[ ! -d .cache/hosts ] || tests/hosts/hosts.py destroy --all
	rm -rf .venv .demo .cache .build .hypothesis
