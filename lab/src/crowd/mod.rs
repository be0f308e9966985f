//! Thousands of real sessions from one process, and what they cost the server.
//!
//! The sessions are `client2`'s: each has a token and an instance of its own, TCP, TLS and the upgrade like any client,
//! and no interface. They idle, with keepalives, and some of them send echo requests through the server's NAT to `web`
//! and check the replies. Beside them an ordinary `ringtun client` on `client` transfers in bulk, in turns with another
//! one in a lab of its own whose server has no crowd.
//!
//! | file | what |
//! | --- | --- |
//! | `session.rs` | one session |
//! | `echo.rs` | its packets |
//! | `tally.rs` | what has become of all of them |
//! | `figures.rs` | what it comes to |

mod echo;
pub mod figures;
mod session;
mod tally;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ringtun::config::STATE_DIR;
use ringtun::status::Report;
use tokio::sync::{Semaphore, watch};
use tokio::task::LocalSet;

use crate::bench::{BenchError, Direction, Stream, median, usage};
use crate::dial::{Accounts, AccountsError};
use crate::host::RUN_LIMIT;
use crate::netns::NamespaceError;
use crate::process::{Process, ProcessError};
use crate::scenario;
use crate::topology::{Lab, LabError, SERVER_V4, Topology, WEB_IPERF_PORT, WEB_V4};
pub(crate) use echo::datagram;
use figures::{Bulk, Figures, Memory, Transfer};
use session::{Common, Order, READ_BYTES, Session};
use tally::{Counts, Tally};

/// Sessions at most: what one source address has ports for.
const SESSIONS_MAX: i64 = 20_000;
/// Handshakes that are under way at a time.
const OPENING_AT_ONCE: usize = 64;
/// Where the sessions go.
const SERVER_PORT: u16 = 443;
/// How long a session may take to open, all others before it: what makes one slow is that there are many.
const OPENING_LIMIT: Duration = Duration::from_secs(600);
/// Echo requests of an active session.
const ECHO_REQUESTS: u16 = 20;
/// How long all echo requests may take.
const ECHO_LIMIT: Duration = Duration::from_secs(60);
/// What has just happened may cost the server a moment longer.
const SETTLING: Duration = Duration::from_secs(3);
/// How often the watcher looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often it tells.
const TELL_INTERVAL: Duration = Duration::from_secs(2);
const GIGA: f64 = 1e9;
/// Descriptors beside those of the sessions.
const OTHER_FILES: u64 = 512;
/// Where `ringtun server` looks for its configuration.
const CONFIG_PATH: &str = "/etc/ringtun/server.toml";
/// All sessions come from one address here.
const CONFIG: &str =
    "[limits]\nvisitors = 4096\nvisitors_per_source = 4096\nhandshakes_per_second = 4096\n";

/// The options of `lab crowd`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How many sessions
    #[arg(value_parser = clap::value_parser!(u32).range(1..=SESSIONS_MAX))]
    sessions: u32,
    /// How many of them send packets
    #[arg(long, default_value_t = 100, value_name = "K")]
    active: u32,
    /// How long to look at the idle server
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How often to transfer in bulk with and without the crowd, either way; 0: not at all
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    rounds: u32,
    /// Write all figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Sessions to open.
    pub sessions: usize,
    /// How many of them send packets.
    pub active: usize,
    /// How long to look at the idle server.
    pub idle: Duration,
    /// How often to transfer in bulk, with and without the crowd, either way.
    pub bulk_rounds: u32,
    /// How long each time.
    pub bulk_seconds: u32,
}

impl Options {
    /// Where to write JSON.
    #[must_use]
    pub fn json(&self) -> Option<&Path> {
        self.json.as_deref()
    }

    /// What they come to.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan {
            sessions: self.sessions as usize,
            active: self.active.min(self.sessions) as usize,
            idle: Duration::from_secs(self.seconds.into()),
            bulk_rounds: self.rounds,
            bulk_seconds: 2,
        }
    }
}

/// Why there are no figures. A session that fails is none: that is a figure.
#[derive(Debug, thiserror::Error)]
pub enum CrowdError {
    /// No lab.
    #[error("no lab for a crowd")]
    Lab(#[from] LabError),
    /// A host is out of reach.
    #[error("a lab host could not be entered")]
    Namespace(#[from] NamespaceError),
    /// ringtun, or a program that measures, failed.
    #[error("a program failed")]
    Process(#[from] ProcessError),
    /// A rate could not be measured.
    #[error("no bulk transfer")]
    Bulk(#[from] BenchError),
    /// The peers could not be made.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// The crowd has no runtime, or too few descriptors.
    #[error("{0}")]
    Machine(String),
    /// The server's status is no report.
    #[error("the server's status")]
    Status(#[from] serde_json::Error),
}

/// Gathers a crowd and measures. `on_lab` is called with every lab, so that it can be ended on a signal.
///
/// # Errors
/// [`CrowdError`].
pub fn run(
    ringtun: &Path,
    plan: Plan,
    mut on_lab: impl FnMut(&Lab),
    mut progress: impl FnMut(&str),
) -> Result<Figures, CrowdError> {
    raise_files(plan.sessions).map_err(CrowdError::Machine)?;
    let lab = Lab::build(Topology::Nat)?;
    on_lab(&lab);
    let server_host = lab.host("server");
    server_host.write_file(CONFIG_PATH, CONFIG)?;
    let names: Vec<String> = (0..plan.sessions)
        .map(|number| format!("crowd-{number}"))
        .collect();
    let accounts = server_host.enter(|| Accounts::make(Path::new(STATE_DIR), &names))??;
    // Before the server starts, which takes some milliseconds to notice one more among thousands.
    let invite = scenario::invite(server_host, ringtun, "client")?;
    let server = scenario::start_server(server_host, ringtun)?;
    // Dropped before the server, so that it can still say goodbye.
    let client = scenario::start_client(lab.host("client"), ringtun, &invite)?;
    let mut watcher = Watcher {
        ringtun,
        plan,
        lab: &lab,
        server: &server,
        memory_before: Memory::of(usage::memory(&usage::family(server.pid()))),
        tally: Arc::default(),
        progress: &mut progress,
    };
    let tally = Arc::clone(&watcher.tally);
    let figures = thread::scope(|scope| {
        let (orders, ordered) = watch::channel(Order::Idle);
        let crowd_host = lab.host("client2");
        let crowd = scope.spawn(move || crowd_host.enter(|| gather(accounts, tally, ordered)));
        // Dropping the orders is the order to leave.
        let figures = watcher.watch(orders, &mut on_lab);
        let gathered = crowd.join().expect("the crowd's thread does not panic");
        gathered??;
        figures
    });
    drop(client);
    figures
}

/// Allows a descriptor for each session, at both ends: the server is a child. The error says why it cannot be.
pub(crate) fn raise_files(sessions: usize) -> Result<(), String> {
    let wanted = sessions as u64 + OTHER_FILES;
    let raise = || {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(wanted)), hard)?;
        Ok(hard)
    };
    match raise() {
        Ok(hard) if hard >= wanted => Ok(()),
        Ok(hard) => Err(format!(
            "{sessions} sessions need {wanted} open files, but {hard} are allowed: raise `ulimit -Hn`"
        )),
        Err(error) => Err(format!(
            "the limit of open files: {}",
            nix::Error::desc(error)
        )),
    }
}

/// The crowd's thread, on its host: opens the sessions and keeps them until nobody gives orders any more.
fn gather(
    accounts: Accounts,
    tally: Arc<Tally>,
    ordered: watch::Receiver<Order>,
) -> Result<(), CrowdError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| CrowdError::Machine(format!("no runtime: {error}")))?;
    let address = SocketAddr::new(SERVER_V4.into(), SERVER_PORT);
    let common = Rc::new(Common {
        server: accounts.endpoint(address)?,
        read_buffer: RefCell::new(vec![0; READ_BYTES]),
        tally,
    });
    let sessions = LocalSet::new();
    let opening = Rc::new(Semaphore::new(OPENING_AT_ONCE));
    for (number, token) in accounts.tokens.into_iter().enumerate() {
        let (common, opening, ordered) = (Rc::clone(&common), Rc::clone(&opening), ordered.clone());
        sessions.spawn_local(attend(common, number, token, opening, ordered));
    }
    drop(ordered);
    runtime.block_on(sessions);
    Ok(())
}

/// One session's task.
async fn attend(
    common: Rc<Common>,
    number: usize,
    token: [u8; 32],
    opening: Rc<Semaphore>,
    mut ordered: watch::Receiver<Order>,
) {
    let place = tokio::select! {
        place = opening.acquire() => place,
        // Nobody watches any more.
        _ = ordered.wait_for(|_| false) => return,
    };
    let tally = Arc::clone(&common.tally);
    let opened = Session::open(common, number, token).await;
    drop(place);
    match opened {
        Err(failure) => tally.not_opened(failure.to_string()),
        Ok(session) => {
            tally.opened();
            if let Err(failure) = session.keep(ordered).await {
                tally.dropped(failure.to_string());
            }
        }
    }
}

/// The thread that measures while the crowd is there.
struct Watcher<'lab> {
    ringtun: &'lab Path,
    plan: Plan,
    lab: &'lab Lab,
    server: &'lab Process,
    memory_before: Memory,
    tally: Arc<Tally>,
    progress: &'lab mut dyn FnMut(&str),
}

impl Watcher<'_> {
    fn watch(
        &mut self,
        orders: watch::Sender<Order>,
        on_lab: &mut dyn FnMut(&Lab),
    ) -> Result<Figures, CrowdError> {
        let plan = self.plan;
        let family = usage::family(self.server.pid());
        let busy_before = usage::processor_time(&family);
        let begun = Instant::now();
        let counts = self.until(&orders, "opened", OPENING_LIMIT, |counts| {
            (counts.tried, plan.sessions)
        });
        let opening = counts
            .last_tried
            .map_or(begun.elapsed(), |last| last.duration_since(begun));
        let opening_cpu = usage::processor_time(&family).saturating_sub(busy_before);

        thread::sleep(SETTLING);
        self.tell(&format!(
            "{} sessions idle for {} s",
            counts.open,
            plan.idle.as_secs()
        ));
        let (idle_from, busy_from) = (Instant::now(), usage::processor_time(&family));
        thread::sleep(plan.idle);
        let busy = usage::processor_time(&family).saturating_sub(busy_from);
        let idle_cpu_percent = 100.0 * busy.as_secs_f64() / idle_from.elapsed().as_secs_f64();
        let idle_report = self.report()?;
        let of = |pid: &i32| Memory::of(usage::memory(&[*pid]));
        let memory = Memory::of(usage::memory(&family));
        let processes = family.iter().map(of).collect();

        self.tell(&format!("{} sessions send echo requests", plan.active));
        let requests = plan.active * usize::from(ECHO_REQUESTS);
        orders.send_replace(Order::Echo {
            sessions: plan.active,
            requests: ECHO_REQUESTS,
        });
        let counts = self.until(&orders, "answered", ECHO_LIMIT, |counts| {
            (counts.echo_times_us.len(), requests)
        });

        let bulk = match plan.bulk_rounds {
            0 => Vec::new(),
            _ => self.bulk(on_lab)?,
        };
        let report = self.report()?;
        let counts_after = self.tally.counts();
        drop(orders);
        Ok(Figures {
            sessions: plan.sessions,
            opened: counts_after.opened,
            failures: counts_after.failures.clone(),
            connected_at_the_server: connected(&report),
            opening_seconds: opening.as_secs_f64(),
            handshakes_per_second: counts.tried as f64 / opening.as_secs_f64(),
            opening_cpu_seconds: opening_cpu.as_secs_f64(),
            memory_before: self.memory_before,
            memory,
            memory_of_processes: processes,
            memory_after: Memory::of(usage::memory(&family)),
            idle_cpu_percent,
            idle_chunks_in_use: idle_report
                .workers
                .iter()
                .map(|worker| worker.buffers_in_use.chunks)
                .sum(),
            active: plan.active,
            echo_requests: counts_after.echo_requests,
            echo_replies: counts_after.echo_times_us.len(),
            echo_time_us: median(counts_after.echo_times_us),
            bulk,
        })
    }

    /// Looks until a count is complete, everybody is gone, or the limit passes.
    fn until(
        &mut self,
        orders: &watch::Sender<Order>,
        what: &str,
        limit: Duration,
        count: impl Fn(&Counts) -> (usize, usize),
    ) -> Counts {
        let begun = Instant::now();
        let mut told = begun;
        loop {
            let counts = self.tally.counts();
            let (done, wanted) = count(&counts);
            let failed: usize = counts.failures.values().sum();
            if done >= wanted || orders.is_closed() || begun.elapsed() >= limit {
                self.tell(&format!(
                    "{done} of {wanted} {what}, {failed} sessions failed"
                ));
                return counts;
            }
            if told.elapsed() >= TELL_INTERVAL {
                told = Instant::now();
                self.tell(&format!(
                    "{done} of {wanted} {what}, {failed} sessions failed"
                ));
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Transfers in turns beside the crowd and in a lab without one.
    fn bulk(&mut self, on_lab: &mut dyn FnMut(&Lab)) -> Result<Vec<Bulk>, CrowdError> {
        let lab = Lab::build(Topology::Nat)?;
        on_lab(&lab);
        let server = scenario::start_server(lab.host("server"), self.ringtun)?;
        let invite = scenario::invite(lab.host("server"), self.ringtun, "client")?;
        let _client = scenario::start_client(lab.host("client"), self.ringtun, &invite)?;
        let mut bulk = Vec::new();
        for (direction, name) in [(Direction::Down, "down"), (Direction::Up, "up")] {
            let (mut beside, mut alone) = (Vec::new(), Vec::new());
            for round in 1..=self.plan.bulk_rounds {
                self.tell(&format!(
                    "bulk transfer {name}, round {round} of {}",
                    self.plan.bulk_rounds
                ));
                // Neither is always the first.
                if round % 2 == 0 {
                    alone.push(self.transfer(&lab, &server, direction)?);
                }
                beside.push(self.transfer(self.lab, self.server, direction)?);
                if round % 2 == 1 {
                    alone.push(self.transfer(&lab, &server, direction)?);
                }
            }
            bulk.push(Bulk::new(name, beside, alone));
        }
        Ok(bulk)
    }

    fn transfer(
        &self,
        lab: &Lab,
        server: &Process,
        direction: Direction,
    ) -> Result<Transfer, CrowdError> {
        let stream = Stream {
            to: (WEB_V4, WEB_IPERF_PORT),
            direction,
            streams: 1,
            seconds: self.plan.bulk_seconds,
            omitted_seconds: 1,
            congestion_control: None,
        };
        let family = usage::family(server.pid());
        let busy = usage::processor_time(&family);
        let transfer = stream.run(lab.host("client"))?;
        let busy = usage::processor_time(&family).saturating_sub(busy);
        Ok(Transfer {
            megabits_per_second: transfer.megabits_per_second,
            server_cpu_seconds_per_gb: busy.as_secs_f64() / (transfer.bytes / GIGA),
        })
    }

    fn report(&self) -> Result<Report, CrowdError> {
        let command = self.lab.host("server").command(self.ringtun);
        let status = command.args(["status", "--json"]).limit(RUN_LIMIT).exec()?;
        Ok(serde_json::from_str(&status)?)
    }

    fn tell(&mut self, line: &str) {
        (self.progress)(line);
    }
}

/// Sessions of the crowd that are connected, as the server sees it.
fn connected(report: &Report) -> usize {
    let of_crowd =
        |name: &Option<String>| name.as_ref().is_some_and(|name| name.starts_with("crowd-"));
    let sessions = report.sessions.iter();
    sessions
        .filter(|session| of_crowd(&session.peer) && !session.connections.is_empty())
        .count()
}
