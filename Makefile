# The commands of README.md. Every target does its own set-up.
export REQUIRE_DEVICES = 1
# Package runtime/secret erases the copies left by a computation with a secret. Keys sealed by a TPM
# need the package.
export GOEXPERIMENT = runtimesecret

.PHONY: build demo run test package install image test-image soak bench fuzz screenshots clean deps

build:
	@scripts/deps.sh build
	@scripts/console.sh
	scripts/build.sh bin

demo: build
	CGO_ENABLED=0 go build -o bin/receiver ./scripts/receiver
	@scripts/demo.sh

run: build
	@scripts/run.sh

# The longest package begins first.
test: deps
	@scripts/console.sh
	go test -timeout 45m ./softhsm-tests ./...

# The Debian packages, the tool for other systems, and the SBOM, in dist/.
package:
	@scripts/deps.sh build
	@scripts/package.sh

# make install DESTDIR=/tmp/root: what the package has, for those who package otherwise. make build comes before.
install:
	@scripts/install.sh "$(DESTDIR)"

# The image that boots into the appliance, in dist/. KEYS=FOLDER VARIANT=vm|rack SETTINGS=FILE; see scripts/image.sh.
image:
	@scripts/deps.sh image
	@scripts/image.sh

# The tests of the image, with all that boot it many times: half an hour and more. make test has the short ones.
test-image: deps
	@scripts/console.sh
	IMAGE=1 go test -count=1 -timeout 3h -v ./image

# SOAK=2h make soak: two hours of everything at once. Each soak prints a seed, which SOAK_SEED repeats.
SOAK ?= 30m
soak: deps
	@scripts/console.sh
	SOAK=$(SOAK) go test -count=1 -timeout 0 -run '^TestSoak$$' -v ./softhsm-tests

bench: deps
	@scripts/console.sh
	go test -run '^$$' -bench . -benchtime 1x ./softhsm-tests ./internal/ledger ./internal/sink ./audit ./policy

# FUZZTIME=10m make fuzz: ten minutes a target. FUZZ=transcript selects targets by package or name.
fuzz: deps
	@scripts/fuzz.sh

# Each page of the console with believable data, light, dark and narrow, as PNG files in screenshots/.
screenshots: deps
	@scripts/console.sh
	SCREENSHOTS=$(CURDIR)/screenshots go test -count=1 -timeout 10m -run '^TestConsolePages$$' ./softhsm-tests

deps:
	@scripts/deps.sh test

clean:
	rm -rf bin dist screenshots .run .run-tpm admin/console/node_modules
	find admin/console/dist -mindepth 1 ! -name .gitignore -delete
