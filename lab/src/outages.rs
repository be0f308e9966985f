//! `lab run outages`: the link between firewall and internet is cut in the middle of bulk transfers, and what passes is
//! the time from its return until the inner receiver gets bytes again.
//!
//! Times are told and not judged, since the machine may be busy. What is judged: every transfer goes on and arrives
//! unchanged, and no connection through the tunnel is reset, one that idles all the while included.

use std::fmt;
use std::io::{self, Write};
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use serde_json::Value;

use crate::bench::Direction;
use crate::host::Host;
use crate::process::ProcessError;
use crate::report::Report;
use crate::scenario::{ScenarioError, Tunnel};
use crate::topology::{Lab, Topology, WEB_V4, WEB_V6};
use crate::transfer::{Transfer, TransferError, connect, converse};
use crate::wire::{Dice, Wire};

/// How soon a transfer is to go on where the kernel bounds the pause between retransmissions (TCP_RTO_MAX_MS).
const PROMISE: Duration = Duration::from_millis(1200);
/// How soon elsewhere.
const PROMISE_WITHOUT_RTO_MAX: Duration = Duration::from_secs(4);
/// What takes longer has not gone on.
const LIMIT: Duration = Duration::from_secs(15);
/// How long bytes may take to flow before the link is cut.
const FLOWING_LIMIT: Duration = Duration::from_secs(60);
/// A link is cut when so much has arrived and up to [`PHASE_MAX`] more has passed.
const FLOWING_BYTES: u64 = 8 << 20;
/// Longer than the tunnel's own clocks: a tick of half a second, retransmissions every second at most.
const PHASE_MAX: Duration = Duration::from_secs(1);
/// What arrives after the first byte until the transfer counts as one that goes on.
const GOING_ON_BYTES: u64 = 1 << 20;
/// How much later than the first byte that may be.
const PICKING_UP: Duration = Duration::from_millis(500);
/// Outages beyond this are another story: TCP_USER_TIMEOUT.
const OUTAGE_MAX: Duration = Duration::from_secs(25);
/// An outage is as much shorter or longer than asked, so that it ends at any phase of clocks that tick since it began.
const OUTAGE_VARIES: f64 = 0.1;
/// Where kernels that have TCP_RTO_MAX_MS show it.
const RTO_MAX_KEY: &str = "/proc/sys/net/ipv4/tcp_rto_max_ms";
/// What `setsockopt` is called with: `include/uapi/linux/tcp.h`.
const IPPROTO_TCP: u64 = 6;
const TCP_RTO_MAX_MS: u64 = 44;

/// The options of `lab run outages`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many seconds the link is away, one outage after the other, each up to a tenth shorter or longer
    #[arg(long, value_name = "S,S...", value_delimiter = ',', value_parser = outage,
        default_value = "0.5,1,2,3,5,10")]
    pub seconds: Vec<Duration>,
    /// How often each of them
    #[arg(long, default_value_t = 1)]
    pub rounds: u32,
    /// Decides when in a transfer the link is cut
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Refuse the tunnel TCP_RTO_MAX_MS, as kernels before 6.15 do
    #[arg(long)]
    pub without_rto_max: bool,
}

fn outage(seconds: &str) -> Result<Duration, String> {
    let seconds: f64 = seconds.parse().map_err(|_| "not a number".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|outage| *outage <= OUTAGE_MAX)
        .ok_or_else(|| format!("not between 0 and {}", OUTAGE_MAX.as_secs()))
}

/// Why the tunnel did not outlive an outage.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the transfer did not go on")]
    Transfer(#[from] TransferError),
    #[error("the connection that was idle all the while is gone")]
    Idle(#[source] io::Error),
    #[error("no status")]
    Status(#[from] ProcessError),
    #[error("the status cannot be understood")]
    NotStatus(#[from] serde_json::Error),
    #[error("the status has no connection")]
    NotConnected,
}

/// What an outage came to.
struct Survival {
    /// From the link's return to the receiver's next bytes.
    next_bytes: Duration,
    /// From the link's return until there were [`GOING_ON_BYTES`] of them.
    going_on: Duration,
    /// Segments that the tunnel's sending end has sent again; none where it has another connection now.
    retransmitted: Option<u64>,
}

/// Plays all outages. The report knows whether everything inside the tunnel has survived.
///
/// # Errors
/// When there is no lab or no tunnel, or the report takes no more.
pub fn outages<W: Write>(
    ringtun: &Path,
    options: &Options,
    report: &mut Report<W>,
    on_start: impl FnOnce(&Lab),
) -> Result<(), ScenarioError> {
    let lab = Lab::build(Topology::Outage)?;
    on_start(&lab);
    let tunnel = match options.without_rto_max {
        false => Tunnel::start(&lab, ringtun)?,
        true => without_rto_max(|| Tunnel::start(&lab, ringtun))?,
    };
    let has_rto_max = !options.without_rto_max && Path::new(RTO_MAX_KEY).exists();
    let promise = match has_rto_max {
        true => PROMISE,
        false => PROMISE_WITHOUT_RTO_MAX,
    };
    report.heading(format_args!(
        "Outages in the middle of transfers, seed {}, {} TCP_RTO_MAX_MS",
        options.seed,
        if has_rto_max { "with" } else { "without" }
    ))?;
    report.line(format_args!(
        "  outage  begins at  direction  next bytes after  a MiB after  outer connection"
    ))?;
    let idle = connect(lab.host("client"), lab.host("web"), WEB_V6.into());
    let wire = lab.wire().expect("the topology has a wire");
    let mut dice = Dice::new(options.seed, 0);
    let mut late = Vec::new();
    for _ in 0..options.rounds {
        for outage in &options.seconds {
            for direction in Direction::BOTH {
                let phase = PHASE_MAX.mul_f64(dice.unit());
                let outage = outage.mul_f64(1.0 + OUTAGE_VARIES * (2.0 * dice.unit() - 1.0));
                let what = format!(
                    "{:>6.2} s  {:>6} ms  {:>9}",
                    outage.as_secs_f64(),
                    phase.as_millis(),
                    direction.word(),
                );
                match survive(&lab, wire, ringtun, direction, phase, outage) {
                    Ok(survival) => {
                        if survival.is_later_than(promise) {
                            late.push(format!("{what}  {survival}"));
                        }
                        report.check(true, format_args!("{what}  {survival}"))?;
                    }
                    Err(failure) => report.outcome(what, Err::<&str, _>(failure))?,
                }
            }
        }
    }
    report.heading("Afterwards")?;
    let idle = idle
        .map_err(Failure::from)
        .and_then(|idle| converse(idle).map_err(Failure::Idle));
    report.outcome(
        "a connection that was idle all the while",
        idle.map(|()| "it still is there"),
    )?;
    match report.failed() {
        0 => report.check(true, "all connections inside the tunnel have survived")?,
        failed => report.line(format_args!(
            "{failed} connections inside the tunnel were lost or did not go on"
        ))?,
    }
    let bound = promise.as_secs_f64();
    match late.as_slice() {
        [] => report.line(format_args!("all transfers went on within {bound} s"))?,
        late => report.line(format_args!("{} took longer than {bound} s:", late.len()))?,
    }
    for line in late {
        report.line(line)?;
    }
    drop(tunnel);
    Ok(())
}

/// Cuts the link in a transfer, mends it, and sees the transfer through.
fn survive(
    lab: &Lab,
    wire: &Wire,
    ringtun: &Path,
    direction: Direction,
    phase: Duration,
    outage: Duration,
) -> Result<Survival, Failure> {
    let sender = match direction {
        Direction::Down => lab.host("server"),
        Direction::Up => lab.host("client"),
    };
    let (client, web) = (lab.host("client"), lab.host("web"));
    let transfer = Transfer::start(client, web, WEB_V4.into(), direction)?;
    transfer.wait_for_more(FLOWING_BYTES, FLOWING_LIMIT, || ())?;
    let before = outer(sender, ringtun)?;
    thread::sleep(phase);
    let cut_at = Instant::now();
    wire.cut();
    thread::sleep(outage);
    wire.mend();
    let mended_at = Instant::now();
    let waited = transfer.time_more(1, LIMIT).and_then(|()| {
        let next_bytes = mended_at.elapsed();
        transfer.time_more(GOING_ON_BYTES, LIMIT)?;
        Ok((next_bytes, mended_at.elapsed()))
    });
    let (next_bytes, going_on) = match waited {
        Ok(times) => times,
        Err(error) => {
            // It knows better why.
            if transfer.has_ended() {
                transfer.finish()?;
            }
            return Err(error.into());
        }
    };
    transfer.finish()?;
    let after = outer(sender, ringtun)?;
    let is_same = after.age_seconds > cut_at.elapsed().as_secs_f64();
    Ok(Survival {
        next_bytes,
        going_on,
        retransmitted: is_same.then(|| after.retransmitted - before.retransmitted),
    })
}

impl Survival {
    /// Whether it took longer until the transfer was going on; that may take a moment more than its first bytes.
    fn is_later_than(&self, promise: Duration) -> bool {
        self.next_bytes > promise || self.going_on > promise + PICKING_UP
    }
}

impl fmt::Display for Survival {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [next_bytes, going_on] =
            [self.next_bytes, self.going_on].map(|time| time.as_secs_f64());
        write!(formatter, "{next_bytes:>14.3} s  {going_on:>9.3} s  ")?;
        match self.retransmitted {
            Some(segments) => write!(formatter, "the same, {segments} segments sent again"),
            None => write!(formatter, "a new one"),
        }
    }
}

/// The connection that one side sends by.
struct Outer {
    age_seconds: f64,
    retransmitted: u64,
}

fn outer(host: &Host, ringtun: &Path) -> Result<Outer, Failure> {
    let status = host.exec(ringtun, ["status", "--json"])?;
    let status: Value = serde_json::from_str(&status)?;
    let connection = &status["sessions"][0]["connections"][0];
    let figures = connection["age_seconds"].as_f64();
    let retransmitted = connection["tcp"]["retransmitted_segments"].as_u64();
    figures
        .zip(retransmitted)
        .map(|(age_seconds, retransmitted)| Outer {
            age_seconds,
            retransmitted,
        })
        .ok_or(Failure::NotConnected)
}

/// Starts something on a thread for which the kernel has no TCP_RTO_MAX_MS, and so for whatever it starts.
fn without_rto_max<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            apply_filter(&refuse_rto_max()).expect("a kernel with seccomp");
            start()
        });
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn refuse_rto_max() -> BpfProgram {
    let argument = |index, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let option = [argument(1, IPPROTO_TCP), argument(2, TCP_RTO_MAX_MS)];
    let rule = option
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .and_then(SeccompRule::new);
    let filter = rule.and_then(|rule| {
        SeccompFilter::new(
            [(libc::SYS_setsockopt, vec![rule])].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOPROTOOPT.cast_unsigned()),
            TargetArch::try_from(std::env::consts::ARCH)?,
        )
    });
    filter
        .and_then(BpfProgram::try_from)
        .expect("a filter that makes sense")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outages_are_seconds() {
        assert_eq!(outage("0.5"), Ok(Duration::from_millis(500)));
        for nonsense in ["", "x", "-1", "26", "inf", "NaN"] {
            assert!(outage(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_transfer_that_starts_and_stops_again_is_late() {
        let is_late = |next_bytes, going_on| {
            let survival = Survival {
                next_bytes: Duration::from_millis(next_bytes),
                going_on: Duration::from_millis(going_on),
                retransmitted: None,
            };
            survival.is_later_than(PROMISE)
        };
        assert!(!is_late(1200, 1600));
        assert!(is_late(1300, 1400));
        assert!(is_late(200, 10_000));
    }
}
