.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

demo:  ## The whole pipeline on this machine (SOUNDS=dir: your own MP3s; KEEP=1: leave the servers up)
	@tests/stack/bootstrap.sh demo && exec .venv/bin/python tests/stack/demo.py

test:  ## Everything that CI runs (REQUIRE_ALL=1: what cannot run fails; ONLY="lint unit")
	@tests/stack/bootstrap.sh test && exec .venv/bin/python tests/run.py $(ONLY)

lint:  ## ruff, mypy and the imports between rooms
	@tests/stack/bootstrap.sh test && exec .venv/bin/python tests/run.py lint

clean:  ## Remove everything that make made here
	rm -rf .venv .demo .cache .build .hypothesis
