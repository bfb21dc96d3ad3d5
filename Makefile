# The commands of README.md. Each does its own set-up.
export REQUIRE_DEVICES = 1
# Copies that a computation with a secret has made are erased (package runtime/secret): for keys that a TPM seals.
export GOEXPERIMENT = runtimesecret

.PHONY: build demo run test bench fuzz clean deps

build: deps
	go build -o bin/countersignd ./cmd/countersignd
	CGO_ENABLED=0 go build -o bin/countersign ./cmd/countersign

demo: build
	@scripts/demo.sh

run: build
	@scripts/run.sh

test: deps
	go test -timeout 20m ./...

bench: deps
	go test -run '^$$' -bench . -benchtime 1x ./softhsm-tests ./internal/ledger ./audit

# FUZZTIME=10m make fuzz; FUZZ=transcript makes it those whose package or name has that.
fuzz: deps
	@scripts/fuzz.sh

deps:
	@scripts/deps.sh

clean:
	rm -rf bin .run .run-tpm
