//! The program: arguments in, exit code out, one line on standard error when something is wrong.
// Their macros panic when the write fails: see `logging`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::io::{ErrorKind as IoErrorKind, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use ringtun::cli::{
    Cli, ClientArgs, Command, DoctorArgs, InviteArgs, IoArgs, PeersArgs, PeersCommand, ServerArgs,
    StateArgs, StatusArgs,
};
use ringtun::config::{ClientConfig, ConfigError, ServerConfig};
use ringtun::control::{self, chain};
use ringtun::doctor::{self, Role};
use ringtun::invite::{Host, Invite, InviteError, PORT_DEFAULT, Pin, parse_host_and_port};
use ringtun::keeper::state::{StateDir, StateError};
use ringtun::keeper::{self, KeeperError};
use ringtun::logging;
use ringtun::panics;
use ringtun::proto::http::Token;
use ringtun::status::query::{self, QueryError};
use ringtun::status::text::text;
use ringtun::tls::certificate::{CertificateError, Identity};

/// Asked to stop.
const EXIT_OK: u8 = 0;
/// Failed, or found something broken.
const EXIT_FAILED: u8 = 1;
/// Bad usage or configuration, as clap has it.
const EXIT_USAGE: u8 = 2;
/// The variable that may hold the invite.
const INVITE_VARIABLE: &str = "RINGTUN_INVITE";
/// An invite on standard input is not longer.
const INVITE_BYTES_MAX: u64 = 4096;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Invite(#[from] InviteError),
    #[error(
        "no invite: give it as argument, as `-` on standard input, in {INVITE_VARIABLE}, or as `invite` in the configuration"
    )]
    NoInvite,
    #[error("cannot read the invite from standard input")]
    Stdin(#[source] std::io::Error),
    #[error("{INVITE_VARIABLE} is not text")]
    NotText,
    #[error("--state-dir and --listen are a server's: leave them out with `--role client`")]
    ServerOptions,

    #[error(transparent)]
    State(#[from] StateError),
    #[error("the configured certificate cannot be used")]
    Certificate(#[source] CertificateError),
    #[error("cannot read {}", .0.display())]
    File(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Status(#[from] QueryError),
    #[error("cannot write to standard output")]
    Stdout(#[source] std::io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Failure::Config(_)
            | Failure::Invite(_)
            | Failure::NoInvite
            | Failure::NotText
            | Failure::ServerOptions
            | Failure::Certificate(_) => EXIT_USAGE,
            Failure::Keeper(error) => error.exit_code(),
            Failure::Stdin(_)
            | Failure::State(_)
            | Failure::File(..)
            | Failure::Status(_)
            | Failure::Stdout(_) => EXIT_FAILED,
        }
    }
}

fn main() -> ExitCode {
    panics::install_hook();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // The help and the version, which go to standard output. A write that fails is ignored.
        Err(message) if !message.use_stderr() => message.exit(),
        Err(message) => {
            let line = on_one_line(&message);
            logging::complain(&format!("{line}; see `ringtun --help`"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    start_logging(&cli.command);
    let code = match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            logging::complain(&chain(&failure));
            failure.exit_code()
        }
    };
    ExitCode::from(code)
}

/// What clap complains of, without the usage that it adds in further paragraphs.
fn on_one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "it needs a command".to_owned();
    }
    let text = error.to_string();
    let paragraphs = text
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let lines: Vec<String> = paragraphs.collect();
    let line = lines.join("; ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn start_logging(command: &Command) {
    logging::start(match command {
        // What it finds is in its report.
        Command::Doctor(_) => "off",
        _ => "info",
    });
}

fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Server(arguments) => Ok(keeper::run_server(server_config(arguments)?)?),
        Command::Client(arguments) => {
            let (config, invite) = client_config(arguments)?;
            Ok(keeper::run_client(config, invite)?)
        }
        Command::Down(arguments) => Ok(keeper::down(arguments.interface.as_deref())?),
        Command::Status(arguments) => status(&arguments),
        Command::Doctor(arguments) => doctor(arguments),
        Command::Invite(arguments) => invite(&arguments),
        Command::Peers(arguments) => peers(arguments),
        // The ring of the control thread is never torn down, so the process must not wait for it.
        Command::Daemon => std::process::exit(control::run_daemon().into()),
    }
}

fn server_config(arguments: ServerArgs) -> Result<ServerConfig, Failure> {
    let mut config = stored_config(&arguments.state)?;
    if !arguments.listen.is_empty() {
        config.listen = arguments.listen;
    }
    config.io = arguments.io.mode.unwrap_or(config.io);
    config.validate()?;
    Ok(config)
}

fn stored_config(arguments: &StateArgs) -> Result<ServerConfig, ConfigError> {
    let mut config = ServerConfig::load(arguments.config.as_deref())?;
    if let Some(state_dir) = &arguments.state_dir {
        config.state_dir = state_dir.clone();
    }
    config.validate()?;
    Ok(config)
}

/// The configuration and the invite, which is taken out of it: it goes its own way.
fn client_config(arguments: ClientArgs) -> Result<(ClientConfig, Invite), Failure> {
    let mut config = ClientConfig::load(arguments.config.as_deref())?;
    config.io = arguments.io.mode.unwrap_or(config.io);
    config.validate()?;
    let configured = config.invite.take();
    let text = match arguments.invite {
        Some(text) if text == "-" => invite_from_stdin()?,
        Some(text) => text,
        None => match std::env::var(INVITE_VARIABLE) {
            Ok(text) => text,
            Err(std::env::VarError::NotUnicode(_)) => return Err(Failure::NotText),
            Err(std::env::VarError::NotPresent) => configured.ok_or(Failure::NoInvite)?,
        },
    };
    Ok((config, text.trim().parse()?))
}

/// Looks at the host for one role or both, and says what was found.
fn doctor(arguments: DoctorArgs) -> Result<u8, Failure> {
    let DoctorArgs { role, config, .. } = arguments;
    let has_server_options = arguments.state_dir.is_some() || !arguments.listen.is_empty();
    if role == Some(Role::Client) && has_server_options {
        return Err(Failure::ServerOptions);
    }
    let server = match role {
        Some(Role::Client) => None,
        _ => Some(server_config(ServerArgs {
            state: StateArgs {
                config: config.clone(),
                state_dir: arguments.state_dir,
            },
            listen: arguments.listen,
            io: IoArgs::default(),
        })?),
    };
    let client = match role {
        Some(Role::Server) => None,
        _ => {
            let client = ClientConfig::load(config.as_deref())?;
            client.validate()?;
            Some(client)
        }
    };
    let findings = doctor::gather(server.as_ref(), client.as_ref());
    let report = doctor::judge(&findings, role);
    let text = if arguments.json {
        report.json() + "\n"
    } else {
        report.text(std::io::stdout().is_terminal())
    };
    print(&text)?;
    Ok(if report.can_run() {
        EXIT_OK
    } else {
        EXIT_FAILED
    })
}

fn invite_from_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin()
        .take(INVITE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(Failure::Stdin)?;
    Ok(text)
}

/// Shows what runs. One that does not answer keeps nobody from hearing of the others.
fn status(arguments: &StatusArgs) -> Result<u8, Failure> {
    let mut code = EXIT_OK;
    for (index, instance) in query::instances(arguments.interface.as_deref())?
        .iter()
        .enumerate()
    {
        let shown = query::document(instance).and_then(|document| {
            if arguments.json {
                return Ok(document + "\n");
            }
            let gap = if index > 0 { "\n" } else { "" };
            Ok(format!(
                "{gap}{}",
                text(&query::report(&instance.interface, &document)?)
            ))
        });
        match shown {
            Ok(shown) => print(&shown)?,
            Err(error) => {
                logging::complain(&chain(&error));
                code = EXIT_FAILED;
            }
        }
    }
    Ok(code)
}

/// Writes to standard output. A closed pipe is no error: the reader has seen enough.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != IoErrorKind::BrokenPipe => Err(Failure::Stdout(error)),
        _ => Ok(()),
    }
}

/// Adds a peer and prints its invite.
fn invite(arguments: &InviteArgs) -> Result<u8, Failure> {
    let config = stored_config(&arguments.state)?;
    let (host, port) = host_and_port(&arguments.host)?;
    let state = StateDir::open(&config.state_dir)?;
    let (pin, sni) = recognition(&config, &state, &host)?;
    let token = Token::from_bytes(state.add_peer(&arguments.name)?);
    // A client that comes before the server knows its token is turned away for good.
    query::wait_for_peers(&state);
    let invite = Invite {
        token,
        host,
        port: port.unwrap_or(PORT_DEFAULT),
        pin,
        sni,
    };
    if let Err(failure) = print(&format!("{invite}\n")) {
        // The token is kept nowhere else, so nobody can ever use this peer's invite.
        state.revoke_peer(&arguments.name)?;
        return Err(failure);
    }
    Ok(EXIT_OK)
}

/// How the client is to recognise the server: the pin, and the name to ask for where the host is an address.
///
/// A generated certificate is always pinned. The operator's own, for a name, is left to the authorities that the
/// client trusts, so that it may be renewed with another key.
fn recognition(
    config: &ServerConfig,
    state: &StateDir,
    host: &Host,
) -> Result<(Option<Pin>, Option<String>), Failure> {
    let is_address = matches!(host, Host::Ip(_));
    match (&config.certificate, &config.private_key) {
        (Some(_), Some(_)) if !is_address => Ok((None, None)),
        (Some(certificate), Some(key)) => {
            let identity = Identity::from_pem(&read(certificate)?, &read(key)?)
                .map_err(Failure::Certificate)?;
            Ok((
                Some(Pin(identity.pin().map_err(Failure::Certificate)?)),
                None,
            ))
        }
        _ => {
            let pin = state.identity()?.pin().map_err(Failure::Certificate)?;
            Ok((
                Some(Pin(pin)),
                is_address.then(|| state.host_name().to_owned()),
            ))
        }
    }
}

/// Lists or revokes peers.
fn peers(arguments: PeersArgs) -> Result<u8, Failure> {
    let config = stored_config(&arguments.state)?;
    let state = StateDir::open(&config.state_dir)?;
    match arguments.command {
        None | Some(PeersCommand::List) => list(&state)?,
        Some(PeersCommand::Revoke { name }) => {
            state.revoke_peer(&name)?;
            query::wait_for_peers(&state);
        }
    }
    Ok(EXIT_OK)
}

/// One line a peer: its name and its addresses, if it has ever been connected.
fn list(state: &StateDir) -> Result<(), Failure> {
    let leases = state.leases()?;
    let mut text = String::new();
    for peer in state.peers()? {
        text.push_str(&peer.name);
        if let Some(lease) = leases.iter().find(|lease| lease.peer == peer.name) {
            text.push_str(&format!(" {} {}", lease.v4, lease.v6));
        }
        text.push('\n');
    }
    print(&text)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|source| Failure::File(path.into(), source))
}

/// As in an invite, but an IPv6 address needs no brackets where no port follows.
fn host_and_port(text: &str) -> Result<(Host, Option<u16>), InviteError> {
    match text.parse() {
        Ok(address) => Ok((Host::Ip(address), None)),
        Err(_) => parse_host_and_port(text),
    }
}
