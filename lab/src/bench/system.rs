//! The systems that are compared, as values: what is written, run and waited for on which host. The report
//! shows all of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::openconnect;
use super::openvpn;
use crate::firewall::{LAN, WAN};
use crate::scenario::{CLIENT_IS_UP, SERVER_IS_READY};
use crate::topology::{CLIENT_V4, SERVER_V4};

/// Where configurations and keys are, on hosts whose `/run` is their own.
pub(super) const DIRECTORY: &str = "/run/bench";
/// ringtun's, where it has one.
const CONFIGURATION: &str = "ringtun.toml";
/// The variable by which `ringtun client` takes its invite.
const INVITE: &str = "RINGTUN_INVITE";

/// A way from `client` to `web`.
#[derive(
    Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// No tunnel; the firewall lets `client` out
    Direct,
    /// ringtun as it is
    Ringtun,
    /// ringtun with what every kernel from 5.10 has and no more
    RingtunBaseline,
    /// ringtun with BBR for its own connection, whatever the system's congestion control is
    RingtunBbr,
    /// ringtun with CUBIC for its own connection
    RingtunCubic,
    /// OpenVPN over TCP 443 with Debian's default settings
    Openvpn,
    /// OpenVPN over TCP 443, tuned
    OpenvpnTuned,
    /// OpenConnect and ocserv, TLS on TCP 443 only
    Openconnect,
}

/// All that it takes to put a system on `server` and `client`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Setup {
    /// Which program it is, in which version.
    pub version: String,
    /// What is worth knowing about the settings.
    pub remark: String,
    /// Configurations and keys.
    pub files: Vec<File>,
    /// What is run to its end, first of all.
    pub prepare: Vec<Step>,
    /// The server.
    pub server: Option<Daemon>,
    /// What is run to its end once the server is there.
    pub server_up: Vec<Step>,
    /// The client.
    pub client: Option<Daemon>,
}

/// A file that a system needs.
#[derive(Clone, Debug, Serialize)]
pub struct File {
    /// Whose.
    pub host: &'static str,
    /// Where.
    pub path: String,
    /// What is in it. Keys and certificates are made anew for every run and are not in the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shown: Option<String>,
    #[serde(skip)]
    pub(super) contents: String,
}

/// A command that ends.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Where.
    pub host: &'static str,
    /// Program and arguments.
    pub command: Vec<String>,
    /// What it reads on standard input.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub input: String,
    /// The variable of the client's environment that its output becomes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_becomes: Option<&'static str>,
}

/// A command that stays.
#[derive(Clone, Debug, Serialize)]
pub struct Daemon {
    /// Program and arguments.
    pub command: Vec<String>,
    /// What it says when it is ready.
    #[serde(skip)]
    pub ready: &'static str,
}

/// A system that cannot be measured here, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Skipped(pub String);

impl System {
    /// All systems, in the order of the report.
    pub const ALL: [System; 8] = [
        System::Direct,
        System::Ringtun,
        System::RingtunBaseline,
        System::RingtunBbr,
        System::RingtunCubic,
        System::Openvpn,
        System::OpenvpnTuned,
        System::Openconnect,
    ];

    /// What is compared unless something else is asked for, on a plain link.
    pub const USUAL: [System; 6] = [
        System::Direct,
        System::Ringtun,
        System::RingtunBaseline,
        System::Openvpn,
        System::OpenvpnTuned,
        System::Openconnect,
    ];

    /// What is compared unless something else is asked for, on a wire.
    pub const FAR: [System; 4] = [
        System::Direct,
        System::Ringtun,
        System::RingtunCubic,
        System::OpenvpnTuned,
    ];

    /// Its name in the JSON and on the command line.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            System::Direct => "direct",
            System::Ringtun => "ringtun",
            System::RingtunBaseline => "ringtun-baseline",
            System::RingtunBbr => "ringtun-bbr",
            System::RingtunCubic => "ringtun-cubic",
            System::Openvpn => "openvpn",
            System::OpenvpnTuned => "openvpn-tuned",
            System::Openconnect => "openconnect",
        }
    }

    /// Its name for people.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            System::Direct => "no tunnel",
            System::Ringtun => "ringtun",
            System::RingtunBaseline => "ringtun, baseline",
            System::RingtunBbr => "ringtun, BBR",
            System::RingtunCubic => "ringtun, CUBIC",
            System::Openvpn => "OpenVPN, default",
            System::OpenvpnTuned => "OpenVPN, tuned",
            System::Openconnect => "OpenConnect/ocserv",
        }
    }

    /// How it is set up with the programs of this machine.
    ///
    /// # Errors
    /// When a program is missing or unsuitable.
    pub fn setup(self, ringtun: &Path) -> Result<Setup, Skipped> {
        match self {
            System::Direct => Ok(direct()),
            System::Ringtun => ringtun_setup(ringtun, &[]),
            System::RingtunBaseline => ringtun_setup(ringtun, &["--io", "baseline"]),
            System::RingtunBbr => ringtun_with(ringtun, "congestion_control = \"bbr\"\n"),
            System::RingtunCubic => ringtun_with(ringtun, "congestion_control = \"cubic\"\n"),
            System::Openvpn => openvpn::setup(&openvpn::DEFAULT),
            System::OpenvpnTuned => openvpn::setup(&openvpn::TUNED),
            System::Openconnect => openconnect::setup(),
        }
    }
}

impl Setup {
    /// Every command as one would type it on the host in front of it.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        let mut commands = Vec::new();
        let mut step = |step: &Step| {
            let input = match step.input.trim_end() {
                "" => String::new(),
                input => format!(" <<'END'\n{input}\nEND"),
            };
            let command = words(&step.command);
            commands.push(match step.output_becomes {
                Some(variable) => format!("{}# {variable}=$({command})", step.host),
                None => format!("{}# {command}{input}", step.host),
            });
        };
        self.prepare.iter().for_each(&mut step);
        if let Some(server) = &self.server {
            step(&Step::new("server", server.command.clone()));
        }
        self.server_up.iter().for_each(&mut step);
        if let Some(client) = &self.client {
            let variables: String = self
                .server_up
                .iter()
                .filter_map(|step| Some(format!("{0}=${0} ", step.output_becomes?)))
                .collect();
            commands.push(format!("client# {variables}{}", words(&client.command)));
        }
        commands
    }
}

impl File {
    /// A file that the report shows.
    pub(super) fn shown(host: &'static str, name: &str, contents: String) -> File {
        File {
            shown: Some(contents.clone()),
            ..File::secret(host, name, contents)
        }
    }

    /// A key or certificate.
    pub(super) fn secret(host: &'static str, name: &str, contents: String) -> File {
        File {
            host,
            path: format!("{DIRECTORY}/{name}"),
            shown: None,
            contents,
        }
    }
}

impl Step {
    pub(super) fn new(host: &'static str, command: Vec<String>) -> Step {
        Step {
            host,
            command,
            input: String::new(),
            output_becomes: None,
        }
    }

    /// Loads nftables rules.
    fn nft(host: &'static str, rules: String) -> Step {
        Step {
            input: rules,
            ..Step::new(host, owned(["nft", "-f", "-"]))
        }
    }
}

/// Nothing but the firewall's consent: everything of `client` gets out, where else only TCP 80 and 443 does.
fn direct() -> Setup {
    let rule = format!(
        "insert rule inet lab forward iifname \"{LAN}\" oifname \"{WAN}\" ip saddr {CLIENT_V4} accept\n"
    );
    Setup {
        version: "Linux forwarding".to_owned(),
        remark: "The same hosts and firewall without a tunnel: the bound of this machine."
            .to_owned(),
        prepare: vec![Step::nft("firewall", rule)],
        ..Setup::default()
    }
}

fn ringtun_setup(ringtun: &Path, options: &[&str]) -> Result<Setup, Skipped> {
    for option in options.iter().filter(|option| option.starts_with("--")) {
        let help = output(ringtun, &["server", "--help"]).unwrap_or_default();
        if !help.contains(option) {
            return Err(Skipped(format!("this build of ringtun has no {option}")));
        }
    }
    let command = |words: &[&str]| -> Vec<String> {
        let ringtun = ringtun.to_string_lossy();
        [&[&*ringtun], words, options]
            .concat()
            .iter()
            .map(|word| (*word).to_owned())
            .collect()
    };
    let invite = [
        &*ringtun.to_string_lossy(),
        "invite",
        "client",
        "--host",
        &SERVER_V4.to_string(),
    ]
    .map(str::to_owned);
    Ok(Setup {
        version: output(ringtun, &["--version"]).unwrap_or_default(),
        remark: match options {
            [] => "As it comes, no configuration.".to_owned(),
            options => format!("With {} on both sides.", options.join(" ")),
        },
        server: Some(Daemon {
            command: command(&["server"]),
            ready: SERVER_IS_READY,
        }),
        server_up: vec![Step {
            output_becomes: Some(INVITE),
            ..Step::new("server", invite.to_vec())
        }],
        client: Some(Daemon {
            command: command(&["client"]),
            ready: CLIENT_IS_UP,
        }),
        ..Setup::default()
    })
}

/// ringtun with a configuration, the same on both sides.
fn ringtun_with(ringtun: &Path, configuration: &str) -> Result<Setup, Skipped> {
    let path = format!("{DIRECTORY}/{CONFIGURATION}");
    let setup = ringtun_setup(ringtun, &["-c", &path])?;
    Ok(Setup {
        files: ["server", "client"]
            .map(|host| File::shown(host, CONFIGURATION, configuration.to_owned()))
            .to_vec(),
        ..setup
    })
}

/// What ringtun does by itself and the others leave to the operator: `server` forwards and masquerades.
pub(super) fn forwarding(pool: &str) -> Vec<Step> {
    let rules = format!(
        "table ip bench {{\n    chain postrouting {{\n        type nat hook postrouting priority srcnat;\n        \
         ip saddr {pool} oifname \"eth0\" masquerade\n    }}\n}}\n"
    );
    vec![
        Step::new("server", owned(["sysctl", "-qw", "net.ipv4.ip_forward=1"])),
        Step::nft("server", rules),
    ]
}

/// Finds a program of the machine as hosts of the lab find it.
pub(super) fn program(name: &str) -> Result<PathBuf, Skipped> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| Skipped(format!("{name} is not installed")))
}

/// The first line that a program says about itself.
pub(super) fn output(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

pub(super) fn owned<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// Words as a shell takes them.
fn words(words: &[String]) -> String {
    let plain = |word: &str| {
        !word.is_empty()
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_./=:,@+%$".contains(c))
    };
    let quoted = words.iter().enumerate().map(|(index, word)| {
        // Where the program is on this machine is of no interest.
        let word = match Path::new(word).file_name() {
            Some(name) if index == 0 => name.to_string_lossy(),
            _ => word.into(),
        };
        if plain(&word) {
            word.into_owned()
        } else {
            format!("'{word}'")
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// The variables that steps have left for the client.
pub(super) type Environment = BTreeMap<&'static str, String>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_json_and_of_the_command_line() {
        for system in System::ALL {
            assert_eq!(
                serde_json::to_value(system).expect("a string"),
                system.key()
            );
            let value = clap::ValueEnum::to_possible_value(&system).expect("a value");
            assert_eq!(value.get_name(), system.key());
        }
    }

    #[test]
    fn commands_can_be_typed() {
        let setup = ringtun_setup(Path::new("/opt/ringtun"), &[]).expect("always there");
        assert_eq!(
            setup.commands(),
            [
                "server# ringtun server",
                "server# RINGTUN_INVITE=$(ringtun invite client --host 198.51.100.10)",
                "client# RINGTUN_INVITE=$RINGTUN_INVITE ringtun client",
            ]
        );
        let direct = direct().commands().concat();
        assert!(
            direct.starts_with("firewall# nft -f - <<'END'\ninsert rule")
                && direct.ends_with("\nEND"),
            "{direct}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let skipped = program("no-such-program").expect_err("nowhere");
        assert_eq!(skipped.0, "no-such-program is not installed");
    }
}
