//! `lab`: shows, holds and measures ringtun in namespaces.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Stdout, stderr, stdout};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use nix::unistd::setsid;
use ringtun_lab::bench::options::Options;
use ringtun_lab::bench::{self, html, svg};
use ringtun_lab::netns::{Ender, become_root};
use ringtun_lab::report::Report;
use ringtun_lab::scenario::{self, ScenarioError};
use ringtun_lab::standing::{self, Standing};
use ringtun_lab::wire::trial;
use ringtun_lab::{Host, Lab, Topology, crowd, hostile, outages, smoke};
use tokio::signal::unix::{Signal, SignalKind, signal};

const USAGE_ERROR: u8 = 2;

/// Shows, holds and measures ringtun in a network of namespaces on this machine.
#[derive(Debug, Parser)]
#[command(name = "lab", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show what the firewall blocks and that ringtun carries it, and leave nothing behind
    Demo {
        #[command(flatten)]
        ringtun: Ringtun,
    },
    /// Make a lab that stays until `lab down`
    Up {
        #[command(flatten)]
        name: Name,
        /// What stands between the clients and the internet
        #[arg(long, value_enum, default_value_t)]
        topology: Topology,
    },
    /// End the lab that `lab up` made
    Down {
        #[command(flatten)]
        name: Name,
    },
    /// Run a command on a host of the lab that `lab up` made
    Exec {
        #[command(flatten)]
        name: Name,
        /// client, client2, firewall, internet, server or web
        host: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Open a shell on a host of the lab that `lab up` made
    Shell {
        #[command(flatten)]
        name: Name,
        /// client, client2, firewall, internet, server or web
        host: String,
    },
    /// Try ringtun in a scenario, with a line for each check; fail if any of them fails
    Run {
        #[command(flatten)]
        ringtun: Ringtun,
        /// What to play
        #[command(subcommand)]
        scenario: Scenario,
    },
    /// Measure ringtun, the same path without a tunnel, and other tunnels
    Bench {
        #[command(flatten)]
        ringtun: Ringtun,
        #[command(flatten)]
        options: Options,
    },
    /// Open thousands of sessions from one process and tell what they cost the server
    Crowd {
        #[command(flatten)]
        ringtun: Ringtun,
        #[command(flatten)]
        options: crowd::Options,
    },
    /// Attack a server as hostile peers and strangers can, and tell what that costs an honest peer
    Hostile {
        #[command(flatten)]
        ringtun: Ringtun,
        #[command(flatten)]
        options: hostile::Options,
    },
    /// Join two hosts by a wire as slow, far and lossy as asked, and tell what it does to packets
    Wire {
        #[command(flatten)]
        options: trial::Options,
    },
    /// What `lab up` leaves behind
    #[command(hide = true)]
    Hold {
        #[command(flatten)]
        name: Name,
        #[arg(long, value_enum)]
        topology: Topology,
    },
}

/// What `lab run` can play.
#[derive(Debug, Subcommand)]
enum Scenario {
    /// Each thing that ringtun does once, on whatever kernel there is
    Smoke,
    /// The path is away for a while in the middle of transfers, again and again
    Outages {
        #[command(flatten)]
        options: outages::Options,
    },
}

#[derive(Debug, clap::Args)]
struct Name {
    /// The lab's name, where there is more than one
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Debug, clap::Args)]
struct Ringtun {
    /// The ringtun binary [default: $RINGTUN_BIN, else the one beside this program, else the one in PATH]
    #[arg(long, value_name = "PATH", global = true)]
    ringtun: Option<PathBuf>,
}

fn main() -> ExitCode {
    let action = Cli::parse().command;
    match perform(action) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(action: Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::Demo { ringtun } => play(ringtun, |ringtun, report, lab| {
            scenario::demo(ringtun, report, lab)
        }),
        Action::Run { ringtun, scenario } => {
            play(ringtun, |ringtun, report, lab| match &scenario {
                Scenario::Smoke => smoke::smoke(ringtun, report, lab),
                Scenario::Outages { options } => outages::outages(ringtun, options, report, lab),
            })
        }
        Action::Up { name, topology } => up(&name.name, topology),
        Action::Down { name } => standing::end(&name.name)
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
        Action::Exec {
            name,
            host,
            command,
        } => exec(&standing::find(&name.name, &host)?, &command),
        Action::Shell { name, host } => shell(&standing::find(&name.name, &host)?),
        Action::Bench { ringtun, options } => measure(ringtun, &options),
        Action::Crowd { ringtun, options } => gather(ringtun, &options),
        Action::Hostile { ringtun, options } => assault(ringtun, &options),
        Action::Wire { options } => try_wire(&options),
        Action::Hold { name, topology } => hold(&name.name, topology),
    }
}

/// Plays a scenario, which gets what to call with the lab, and says how it went.
fn play(
    ringtun: Ringtun,
    scenario: impl FnOnce(&Path, &mut Report<Stdout>, Box<dyn FnMut(&Lab)>) -> Result<(), ScenarioError>,
) -> anyhow::Result<ExitCode> {
    let Some(ringtun) = ringtun.find() else {
        return Ok(no_ringtun());
    };
    become_root()?;
    let mut report = Report::new(stdout());
    let mut on_ender = end_on_signal()?;
    let on_lab = move |lab: &Lab| on_ender(lab.ender());
    scenario(&ringtun, &mut report, Box::new(on_lab))?;
    match report.failed() {
        0 => {
            report.heading("All of it is as it should be.")?;
            Ok(ExitCode::SUCCESS)
        }
        failed => bail!("{failed} checks failed"),
    }
}

fn measure(ringtun: Ringtun, options: &Options) -> anyhow::Result<ExitCode> {
    // What cannot be written should be known before half an hour has passed.
    let files = options.files();
    for path in files.into_iter().flatten() {
        let opened = File::options().create(true).append(true).open(path);
        opened.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let Some(ringtun) = ringtun.find() else {
        return Ok(no_ringtun());
    };
    become_root()?;
    let mut on_ender = end_on_signal()?;
    let on_lab = |lab: &Lab| on_ender(lab.ender());
    let figures = bench::run(&ringtun, options.plan(), on_lab, |line| eprintln!("{line}"))?;
    print!("{}", figures.to_table());
    let texts = [
        serde_json::to_string_pretty(&figures)? + "\n",
        html::page(&figures),
        svg::sheet(&figures, &svg::Plot::FEW),
        figures.to_markdown(),
    ];
    for (path, text) in files.into_iter().zip(texts) {
        let Some(path) = path else { continue };
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(match figures.has_failed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn gather(ringtun: Ringtun, options: &crowd::Options) -> anyhow::Result<ExitCode> {
    let json = options.json();
    if let Some(path) = json {
        let opened = File::options().create(true).append(true).open(path);
        opened.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let Some(ringtun) = ringtun.find() else {
        return Ok(no_ringtun());
    };
    become_root()?;
    let mut on_ender = end_on_signal()?;
    let on_lab = |lab: &Lab| on_ender(lab.ender());
    let figures = crowd::run(&ringtun, options.plan(), on_lab, |line| eprintln!("{line}"))?;
    print!("{}", figures.to_table());
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(match figures.has_failed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn assault(ringtun: Ringtun, options: &hostile::Options) -> anyhow::Result<ExitCode> {
    if options.wants_list() {
        print!("{}", hostile::list());
        return Ok(ExitCode::SUCCESS);
    }
    let json = options.json();
    if let Some(path) = json {
        let opened = File::options().create(true).append(true).open(path);
        opened.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let Some(ringtun) = ringtun.find() else {
        return Ok(no_ringtun());
    };
    become_root()?;
    let mut on_ender = end_on_signal()?;
    let on_lab = |lab: &Lab| on_ender(lab.ender());
    let figures = hostile::run(&ringtun, &options.plan(), on_lab, |line| {
        eprintln!("{line}");
    })?;
    print!("{}", figures.to_table());
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(match figures.has_failed() && !options.is_report_only() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn try_wire(options: &trial::Options) -> anyhow::Result<ExitCode> {
    let plan = match options.plan() {
        Ok(plan) => plan,
        Err(unsound) => {
            eprintln!("lab: {unsound}");
            return Ok(ExitCode::from(USAGE_ERROR));
        }
    };
    become_root()?;
    let mut on_ender = end_on_signal()?;
    print!("{}", trial::run(options, &plan, &mut on_ender)?);
    Ok(ExitCode::SUCCESS)
}

/// Starts the holder and waits until the lab is there.
fn up(name: &str, topology: Topology) -> anyhow::Result<ExitCode> {
    let mut holder = Command::new(env::current_exe()?)
        .args(["hold", "--name", name, "--topology", &topology.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(holder.stdout.take().context("the holder's output")?).read_line(&mut line)?;
    if line.trim() == "up" {
        println!("lab \"{name}\" is up: client, client2, firewall, internet, server, web");
        println!("lab shell client opens a shell there, lab down ends it");
        return Ok(ExitCode::SUCCESS);
    }
    let mut complaint = String::new();
    holder
        .stderr
        .take()
        .context("the holder's errors")?
        .read_to_string(&mut complaint)?;
    holder.wait()?;
    eprint!("{complaint}");
    Ok(ExitCode::FAILURE)
}

/// Holds a lab until told to end.
fn hold(name: &str, topology: Topology) -> anyhow::Result<ExitCode> {
    setsid().context("no session of its own")?;
    let mut standing = Standing::claim(name)?;
    become_root()?;
    env::set_current_dir("/")?;
    let signals = Signals::catch()?;
    let lab = Lab::build(topology)?;
    standing.publish(&lab)?;
    println!("up");
    signals.wait();
    // First the lab, then the lock that says that it is there.
    drop(lab);
    drop(standing);
    Ok(ExitCode::SUCCESS)
}

fn exec(host: &Host, command: &[OsString]) -> anyhow::Result<ExitCode> {
    let [program, arguments @ ..] = command else {
        bail!("no command")
    };
    Ok(code(host.command(program).args(arguments).foreground()?))
}

fn shell(host: &Host) -> anyhow::Result<ExitCode> {
    let shell = env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
    let prompt = format!("{}# ", host.name());
    Ok(code(
        host.command(shell)
            .env("PS1", prompt)
            .env("LAB_HOST", host.name())
            .foreground()?,
    ))
}

/// Makes Ctrl-C and SIGTERM end labs before they end the program. The answer is to be called with every lab's ender.
fn end_on_signal() -> anyhow::Result<impl FnMut(Ender)> {
    let signals = Signals::catch()?;
    let enders = Arc::new(Mutex::new(Vec::<Ender>::new()));
    let to_end = Arc::clone(&enders);
    thread::spawn(move || {
        let number = signals.wait();
        // Nobody is to read what a lab without processes looks like.
        let _silence = (stdout().lock(), stderr().lock());
        for ender in to_end.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            ender.end();
        }
        process::exit(128 + number);
    });
    Ok(move |ender: Ender| {
        let mut enders = enders.lock().unwrap_or_else(PoisonError::into_inner);
        enders.push(ender);
    })
}

/// The signals that ask a program to end.
struct Signals {
    runtime: tokio::runtime::Runtime,
    caught: [(SignalKind, Signal); 3],
}

impl Signals {
    /// From here on they wait for [`Signals::wait`] instead of ending the program.
    fn catch() -> anyhow::Result<Signals> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let _context = runtime.enter();
        let catch = |kind| {
            signal(kind)
                .map(|signal| (kind, signal))
                .context("signals cannot be caught")
        };
        let caught = [
            catch(SignalKind::interrupt())?,
            catch(SignalKind::terminate())?,
            catch(SignalKind::hangup())?,
        ];
        Ok(Signals { runtime, caught })
    }

    /// Returns the number of the first one that comes.
    fn wait(self) -> i32 {
        let Signals {
            runtime,
            caught: [mut interrupt, mut terminate, mut hangup],
        } = self;
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.1.recv() => interrupt.0.as_raw_value(),
                _ = terminate.1.recv() => terminate.0.as_raw_value(),
                _ = hangup.1.recv() => hangup.0.as_raw_value(),
            }
        })
    }
}

impl Ringtun {
    fn find(self) -> Option<PathBuf> {
        let named = self
            .ringtun
            .or_else(|| env::var_os("RINGTUN_BIN").map(PathBuf::from));
        if let Some(named) = named {
            return named.canonicalize().ok();
        }
        let sibling = env::current_exe().ok()?.with_file_name("ringtun");
        let path = env::var_os("PATH").unwrap_or_default();
        let installed = env::split_paths(&path).map(|directory| directory.join("ringtun"));
        std::iter::once(sibling)
            .chain(installed)
            .find(|candidate| candidate.is_file())
    }
}

fn no_ringtun() -> ExitCode {
    eprintln!(
        "lab: there is no ringtun binary; build it (cargo build --release) or name it (--ringtun PATH)"
    );
    ExitCode::from(USAGE_ERROR)
}

/// A command's own exit code, or what a shell makes of the signal that ended it.
fn code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
