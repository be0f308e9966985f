//! The `nft` program: rulesets as text in, JSON out.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::signal::isolate;

/// Looked at after `PATH`, which lacks them in many user shells.
const SYSTEM_DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Why a ruleset is not in force.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program is not there.
    #[error("`nft` is not installed: install the package nftables (`apt install nftables`)")]
    Missing,
    /// The program could not be run.
    #[error("cannot run `nft`")]
    Run(#[source] io::Error),
    /// The kernel or the program refused.
    #[error("nft refuses the rules: {0}")]
    Refused(String),
}

/// Whether `nft` is there at all, to be asked before anything is changed.
///
/// # Errors
/// [`NftError::Missing`].
pub fn check_installed() -> Result<(), NftError> {
    program().map(drop)
}

/// Puts a ruleset into force, all of it or nothing.
///
/// # Errors
/// [`NftError`].
pub fn apply(ruleset: &str) -> Result<(), NftError> {
    feed(&["-f", "-"], ruleset)
}

/// Has the kernel look at a ruleset as if to put it into force, and leaves everything as it is.
///
/// # Errors
/// [`NftError`].
pub fn check(ruleset: &str) -> Result<(), NftError> {
    feed(&["--check", "-f", "-"], ruleset)
}

/// Removes a table of the family `inet`; one that is not there is no error.
///
/// # Errors
/// [`NftError`].
pub fn delete_table(name: &str) -> Result<(), NftError> {
    apply(&format!("table inet {name}\ndelete table inet {name}\n"))
}

/// The whole ruleset as JSON (`libnftables-json(5)`).
///
/// # Errors
/// [`NftError`].
pub fn list_ruleset_json() -> Result<String, NftError> {
    let output = command(&["-j", "list", "ruleset"])?
        .stdin(Stdio::null())
        .output()
        .map_err(NftError::Run)?;
    succeeded(output)
}

fn feed(arguments: &[&str], ruleset: &str) -> Result<(), NftError> {
    let mut child = command(arguments)?
        .stdin(Stdio::piped())
        .spawn()
        .map_err(NftError::Run)?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // When nft ends early, its exit status says why, and not this write.
    let _ = stdin.write_all(ruleset.as_bytes());
    drop(stdin);
    succeeded(child.wait_with_output().map_err(NftError::Run)?).map(drop)
}

fn command(arguments: &[&str]) -> Result<Command, NftError> {
    let mut command = Command::new(program()?);
    isolate(&mut command)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(command)
}

fn program() -> Result<PathBuf, NftError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join("nft"))
        .find(|program| Path::is_file(program))
        .ok_or(NftError::Missing)
}

fn succeeded(output: Output) -> Result<String, NftError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    if let Some(signal) = output.status.signal() {
        let reason = format!("it was ended by signal {signal}");
        return Err(NftError::Run(io::Error::other(reason)));
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let first = stderr.lines().next().unwrap_or("no reason given");
    Err(NftError::Refused(first.to_owned()))
}
