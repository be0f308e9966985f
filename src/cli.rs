//! The command line: what may be typed, nothing of what it does.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::IoMode;
use crate::doctor::Role;

const ABOUT: &str = "A tunnel through firewalls that let out nothing but TCP 80 and 443.";

const AFTER_HELP: &str = "\
On the server:   ringtun server
                 ringtun invite alice --host server.example.org
On the client:   ringtun client 'ringtun://...'

Both sides need root. Logs go to standard error; RUST_LOG=debug says more.
SIGINT, SIGTERM and SIGQUIT stop; SIGHUP reloads, or stops if there is a terminal.
Exit codes: 0 asked to stop, 1 failed at run time, 2 bad usage or configuration.";

const CLIENT_HELP: &str = "\
The invite is a secret. Where others can read this host's process list, give it
by the environment variable RINGTUN_INVITE, by standard input (INVITE is `-`) or
by `invite = \"...\"` in the configuration. The command line goes before the
environment, and that before the configuration.

Where the path loses packets, or holds more than one connection can have under
way, the client opens four connections, or sixteen if packets are lost and there
is no BBR, and shares the traffic out among them; `connections` in the
configuration says another number.

The tunnel stays up, and reconnects by itself, until Ctrl-C or SIGTERM; then
routes and resolver are as they were before.";

const STATUS_HELP: &str = "\
Bytes and packets are those inside the tunnel, where a packet may be one of up to
64 KiB. `dropped` names the reason and how many packets it has cost.

Exit codes: 0 everything that runs has answered, 1 nothing runs or something does
not answer, 2 bad usage.";

const DOCTOR_HELP: &str = "\
It rehearses a start and undoes it at once: nothing is changed on the host, and
a running ringtun is not disturbed. Run it as root, as the server and the client.

Each line is ok, degraded (it runs, but worse than it could), broken or n/a, with
the fix below. Exit code 0 if the role can run, without --role if both can, else 1.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "ringtun", version, about = ABOUT, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server, in the foreground
    Server(ServerArgs),
    /// Add a peer and print its invite
    Invite(InviteArgs),
    /// Connect to a server and route this host's traffic through it, in the foreground
    #[command(after_help = CLIENT_HELP)]
    Client(ClientArgs),
    /// Stop the server and client of this network namespace, or clean up after killed ones
    Down(DownArgs),
    /// Show what the server and client of this network namespace are doing
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// List the server's peers, or revoke one
    Peers(PeersArgs),
    /// Look whether this host can run ringtun, and say what to do where it cannot
    #[command(after_help = DOCTOR_HELP)]
    Doctor(DoctorArgs),
    /// The unprivileged half, started by the server and the client
    #[command(hide = true)]
    Daemon,
}

/// Where the server's configuration and state are.
#[derive(Debug, Default, Args)]
pub struct StateArgs {
    /// Configuration file [default: /etc/ringtun/server.toml, where that exists]
    #[arg(short, long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Where peers, leases and the certificate are kept [default: /var/lib/ringtun]
    #[arg(long, value_name = "DIR", global = true)]
    pub state_dir: Option<PathBuf>,
}

/// `ringtun server`.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Configuration and state.
    #[command(flatten)]
    pub state: StateArgs,
    /// Addresses and ports to listen on
    #[arg(
        long,
        value_name = "ADDR",
        help = "Address and port to listen on; may be repeated [default: [::]:443 and [::]:80]"
    )]
    pub listen: Vec<SocketAddr>,
    /// What of io_uring to use.
    #[command(flatten)]
    pub io: IoArgs,
}

/// Options of both sides that concern io_uring.
#[derive(Debug, Default, Args)]
pub struct IoArgs {
    /// What of io_uring to use; goes before `io` in the configuration [default: auto]
    #[arg(long = "io", value_name = "MODE", value_enum)]
    pub mode: Option<IoMode>,
}

/// `ringtun invite`.
#[derive(Debug, Args)]
pub struct InviteArgs {
    /// The new peer's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Configuration and state.
    #[command(flatten)]
    pub state: StateArgs,
    /// The name or address that the client is to connect to; an IPv6 address with a port needs brackets
    #[arg(long, value_name = "HOST[:PORT]")]
    pub host: String,
}

/// `ringtun client`.
#[derive(Debug, Args)]
pub struct ClientArgs {
    /// Configuration file [default: /etc/ringtun/client.toml, where that exists]
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The invite that `ringtun invite` printed, or `-` to read it from standard input
    #[arg(value_name = "INVITE")]
    pub invite: Option<String>,
    /// What of io_uring to use.
    #[command(flatten)]
    pub io: IoArgs,
}

/// `ringtun down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// Only the one that uses this interface [default: all of this network namespace]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
}

/// `ringtun status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// For programs: one JSON document a line, one line for each that runs
    #[arg(long)]
    pub json: bool,
    /// Only the one that uses this interface [default: all of this network namespace]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
}

/// `ringtun doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// What this host is to be [default: both are looked at]
    #[arg(long, value_enum)]
    pub role: Option<Role>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Configuration file of the role [default: those of `ringtun server` and `ringtun client`]
    #[arg(short, long, value_name = "FILE", requires = "role")]
    pub config: Option<PathBuf>,
    /// Where the server's state is kept [default: /var/lib/ringtun]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the server is to listen
    #[arg(
        long,
        value_name = "ADDR",
        help = "Address and port that the server is to listen on; may be repeated [default: [::]:443 and [::]:80]"
    )]
    pub listen: Vec<SocketAddr>,
}

/// `ringtun peers`.
#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Configuration and state.
    #[command(flatten)]
    pub state: StateArgs,
    /// What to do with them.
    #[command(subcommand)]
    pub command: Option<PeersCommand>,
}

/// `ringtun peers ...`.
#[derive(Debug, Subcommand)]
pub enum PeersCommand {
    /// List the peers (what `ringtun peers` alone does)
    List,
    /// Make a peer's invite worthless and end its session
    Revoke {
        /// The peer's name
        #[arg(value_name = "NAME")]
        name: String,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_the_readme_says_parses() {
        for line in [
            "ringtun server",
            "ringtun server -c f --state-dir d --listen 0.0.0.0:443 --listen [::1]:80",
            "ringtun invite alice --state-dir d --host 198.51.100.10",
            "ringtun client ringtun://x",
            "ringtun server --io baseline",
            "ringtun client --io auto ringtun://x",
            "ringtun client -",
            "ringtun client",
            "ringtun down",
            "ringtun status",
            "ringtun status --json --interface ringtun1",
            "ringtun doctor",
            "ringtun doctor --role client --json -c f",
            "ringtun doctor --role server --state-dir d --listen [::]:443 --listen [::]:80",
            "ringtun peers --state-dir d",
            "ringtun peers list",
            "ringtun peers --state-dir d revoke alice",
            "ringtun peers revoke alice --state-dir d",
        ] {
            Cli::try_parse_from(line.split(' ')).expect(line);
        }
    }

    #[test]
    fn the_daemon_is_not_shown() {
        assert!(
            !Cli::command()
                .render_long_help()
                .to_string()
                .contains("daemon")
        );
    }
}
