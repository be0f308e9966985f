//! `just instructions`: how many instructions the pieces of the packet path take, by valgrind's callgrind.
//!
//! Instructions are not time, but the same on every run, busy machine or not: a piece that takes more of them than
//! `lab/benches/instructions.toml` says has become slower, or does more, and somebody should know. Each case runs in a process of
//! its own under callgrind, which counts inside of [`counted`] only.
//!
//! What depends on the processor ([`Case::dispatched`]) is counted for the one that valgrind shows: AVX2 and AES-NI, but
//! neither AVX-512 nor VAES, so aws-lc takes another way for AES-GCM than on most servers.

mod cases;

use cases::{Case, Volume, Work};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::{Command, ExitCode, Stdio};

/// The counts to hold to.
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.toml");
const TABLE_HEAD: &str = "# Instructions of one run of each case in lab/benches/cases, by callgrind.\n\
    # `just instructions` compares with this, `just instructions --update` writes it.\n\n";
/// Runs before the counted one, so that nothing is lazily set up in that.
const WARM_UP_RUNS: usize = 8;
/// How much more is not worth a word, by the tools that made the table.
const TOLERANCE_PERCENT: f64 = 3.0;
/// The same by another compiler.
const TOLERANCE_OTHER_COMPILER_PERCENT: f64 = 10.0;
/// The same for what is dispatched at run time, by another valgrind or on another C library.
const TOLERANCE_OTHER_MACHINE_PERCENT: f64 = 25.0;

/// What the counts depend on besides the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tools {
    target: String,
    rustc: String,
    valgrind: String,
    libc: String,
    /// What of this processor valgrind can show to the program; the rest never is.
    processor: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    tools: Tools,
    instructions: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    // `cargo bench` adds `--bench`.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let outcome = match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => compare(),
        ["--update"] => update(),
        ["--run", name] => run(name),
        _ => Err("usage: just instructions [--update]".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("instructions: {line}");
            ExitCode::FAILURE
        }
    }
}

/// All that callgrind counts.
#[inline(never)]
fn counted(work: &mut dyn Work) {
    work.run();
    // Or this would be no call but a jump, and the function's end not its end.
    std::hint::black_box(());
}

/// Runs one case, under callgrind.
fn run(name: &str) -> Result<(), String> {
    let case = cases::all()
        .into_iter()
        .find(|case| case.name == name)
        .ok_or_else(|| format!("no case {name}"))?;
    let mut work = (case.make)();
    for _ in 0..WARM_UP_RUNS {
        work.prepare();
        work.run();
    }
    work.prepare();
    counted(&mut *work);
    Ok(())
}

fn compare() -> Result<(), String> {
    let text = std::fs::read_to_string(TABLE).map_err(|error| format!("{TABLE}: {error}"))?;
    let table: Table = toml::from_str(&text).map_err(|error| format!("{TABLE}: {error}"))?;
    let tools = tools()?;
    if tools != table.tools {
        println!("the table was made by {:?}", table.tools);
        println!("this is {tools:?}: more is tolerated, or nothing compared");
    }
    let (mut worse, mut better) = (Vec::new(), Vec::new());
    let mut forgotten = table.instructions.clone();
    for case in cases::all() {
        let now = count(&case)?;
        let Some(before) = forgotten.remove(case.name) else {
            println!("{:42} {now:>10}  is not in the table", case.name);
            worse.push(case.name);
            continue;
        };
        let percent = (now as f64 / before as f64 - 1.0) * 100.0;
        let each = each(now, case.volume);
        let Some(tolerance) = tolerance_percent(&case, &tools, &table.tools) else {
            println!(
                "{:42} {now:>10} {each:>14}  not compared: another processor",
                case.name
            );
            continue;
        };
        println!(
            "{:42} {now:>10} {each:>14}  {percent:>+6.2} % (+{tolerance} % allowed)",
            case.name
        );
        if percent > tolerance {
            worse.push(case.name);
        } else if percent < -tolerance {
            better.push(case.name);
        }
    }
    for name in forgotten.keys() {
        println!("{name:42} is in the table, but is no case");
    }
    if !better.is_empty() {
        println!(
            "fewer than in the table: {}; let `just instructions --update` keep that",
            better.join(", ")
        );
    }
    if !worse.is_empty() || !forgotten.is_empty() {
        return Err(format!(
            "more instructions than lab/benches/instructions.toml says, or a case too many or too few: {}; if that is as it \
             has to be, `just instructions --update` and commit the table, with the reason",
            worse
                .into_iter()
                .chain(forgotten.keys().map(String::as_str))
                .collect::<Vec<_>>()
                .join(", ")
        ));
    }
    Ok(())
}

/// The instructions of a run by what it goes through.
fn each(instructions: u64, volume: Volume) -> String {
    match volume {
        Volume::Bytes(bytes) => format!("{:.2}/byte", instructions as f64 / bytes as f64),
        Volume::Packets(packets) => format!("{:.0}/packet", instructions as f64 / packets as f64),
    }
}

/// `None`: there is nothing to compare with.
fn tolerance_percent(case: &Case, here: &Tools, table: &Tools) -> Option<f64> {
    if here.target != table.target || (case.dispatched && here.processor != table.processor) {
        None
    } else if case.dispatched && (here.valgrind != table.valgrind || here.libc != table.libc) {
        Some(TOLERANCE_OTHER_MACHINE_PERCENT)
    } else if here.rustc != table.rustc {
        Some(TOLERANCE_OTHER_COMPILER_PERCENT)
    } else {
        Some(TOLERANCE_PERCENT)
    }
}

fn update() -> Result<(), String> {
    let mut instructions = BTreeMap::new();
    for case in cases::all() {
        let count = count(&case)?;
        println!(
            "{:42} {count:>10} {:>14}",
            case.name,
            each(count, case.volume)
        );
        instructions.insert(case.name.to_owned(), count);
    }
    let table = Table {
        tools: tools()?,
        instructions,
    };
    let mut text = TABLE_HEAD.to_owned();
    let body = toml::to_string(&table).map_err(|error| error.to_string())?;
    write!(text, "{body}").map_err(|error| error.to_string())?;
    std::fs::write(TABLE, text).map_err(|error| format!("{TABLE}: {error}"))
}

/// The instructions of one run.
fn count(case: &Case) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            "--collect-atstart=no",
            "--toggle-collect=instructions::counted",
        ])
        .arg(program)
        .args(["--run", case.name])
        // Else a developer's settings could change aws-lc's way.
        .env_remove("OPENSSL_ia32cap")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("valgrind: {error} (`just instructions` installs it)"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let counted = said
        .lines()
        .find_map(|line| line.split_once("Collected :"))
        .and_then(|(_, count)| count.trim().parse().ok());
    match counted {
        Some(count) if output.status.success() && count > 0 => Ok(count),
        _ => Err(format!("{} under callgrind: {said}", case.name)),
    }
}

fn tools() -> Result<Tools, String> {
    let rustc = said_by("rustc", &["-vV"])?;
    let after = |name: &str| {
        rustc
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .to_owned()
    };
    Ok(Tools {
        target: after("host: "),
        rustc: after("release: "),
        valgrind: said_by("valgrind", &["--version"])?.trim().to_owned(),
        libc: said_by("getconf", &["GNU_LIBC_VERSION"])?.trim().to_owned(),
        processor: processor(),
    })
}

#[cfg(target_arch = "x86_64")]
fn processor() -> Vec<String> {
    use std::arch::is_x86_feature_detected as has;
    [
        ("aes", has!("aes")),
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("bmi2", has!("bmi2")),
        ("movbe", has!("movbe")),
        ("pclmulqdq", has!("pclmulqdq")),
    ]
    .into_iter()
    .filter(|(_, there)| *there)
    .map(|(name, _)| name.to_owned())
    .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> Vec<String> {
    Vec::new()
}

fn said_by(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
