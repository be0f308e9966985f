# What CI runs and what a person runs. `./ci/setup` installs what the recipes need.

set shell := ["bash", "-euo", "pipefail", "-c"]

target := env("CARGO_TARGET_DIR", justfile_directory() / "target")

# List the recipes
default:
    @just --list --unsorted

# Everything that is found without running anything
check: lint doc

# Format, lints, scripts, workflows
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    shellcheck -x ci/* .ci/run
    ci/actionlint

# The documentation of the code, below target/doc
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked

# All tests, as root or as root of a user namespace
test *args:
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_'); \
    export "CARGO_TARGET_${host}_RUNNER={{ justfile_directory() }}/ci/as-root"; \
    cargo test --workspace --locked {{ args }}

# Unit and property tests
unit *args:
    just test --lib --bins {{ args }}

# The tests that run in the lab, and those on real rings
e2e *args:
    just test --test "'*'" {{ args }}

# The same with nothing of io_uring that Linux 5.10 has not
e2e-baseline *args:
    RINGTUN_TEST_IO=baseline just test -p ringtun --test "'e2e_*'" --test packet_path --test allocations {{ args }}

# Two sessions joined in memory, in made-up time: `just simulate 20000` tries so many seeds
simulate seeds="2000":
    RINGTUN_SIMULATION_SEEDS={{ seeds }} cargo test --locked --test simulation -- --nocapture

# The demonstration: what the firewall blocks, and that ringtun carries it
lab: release
    ci/as-root {{ target }}/release/lab demo

# Compare ringtun with other tunnels and with none: `just bench --quick --html report.html`
bench *args: release
    ci/as-root {{ target }}/release/lab bench {{ args }}

# Attack a server and measure what it costs an honest peer: `just hostile --list`, `just hostile --attack tiny-records`
hostile *args: release
    ci/as-root {{ target }}/release/lab hostile {{ args }}

# How long the pieces of the packet path take, by criterion: wants a quiet machine. `just microbench record/seal`
microbench *args:
    cargo bench -p ringtun-benches --bench microbench --locked -- {{ args }}

# Count instructions of the same pieces, and compare with lab/benches/instructions.toml: `--update` writes it
instructions *args:
    ci/instructions {{ args }}

# Debian's kernels under qemu, with the lab inside: `just kernels 5.10`, `just kernels --list`
kernels *args: release
    ci/kernels {{ args }}

# Build both programs with optimisation
release:
    cargo build --workspace --bins --release --locked

# Licences, advisories and sources of the dependencies: `just deny licenses bans sources` needs no network
deny *checks:
    ci/deny {{ checks }}
