//! `/etc/resolv.conf`: replaced while a tunnel is up, and put back exactly.
//!
//! A regular file is written in place, because it may be a bind mount (containers, `ip netns exec`) that cannot be
//! renamed over. A symbolic link is replaced as such: what it points to belongs to another program.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The resolver's configuration.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where systemd-resolved writes down the nameservers behind its own 127.0.0.53.
pub const RESOLVED_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
/// More than any resolver reads.
const RESOLV_CONF_BYTES_MAX: u64 = 64 * 1024;

/// A resolver configuration that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: set `dns = []` to leave it alone", path.display())]
pub struct DnsError {
    /// `read`, `write` or `restore`.
    pub what: &'static str,
    /// The file.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

/// What was there before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Saved {
    /// Nothing.
    Missing,
    /// A regular file with this content.
    File(Vec<u8>),
    /// A symbolic link to this path.
    Link(PathBuf),
}

/// Remembers what is at `path`.
///
/// # Errors
/// [`DnsError`].
pub fn save(path: &Path) -> Result<Saved, DnsError> {
    let saved = || match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Saved::Missing),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_symlink() => Ok(Saved::Link(fs::read_link(path)?)),
        Ok(metadata) if metadata.len() > RESOLV_CONF_BYTES_MAX => {
            Err(io::ErrorKind::FileTooLarge.into())
        }
        Ok(_) => Ok(Saved::File(fs::read(path)?)),
    };
    saved().map_err(failed("read", path))
}

/// Puts `content` where `saved` was.
///
/// # Errors
/// [`DnsError`].
pub fn write(path: &Path, saved: &Saved, content: &[u8]) -> Result<(), DnsError> {
    match saved {
        Saved::Missing | Saved::File(_) => write_in_place(path, content),
        Saved::Link(_) => {
            let temporary = temporary(path);
            write_in_place(&temporary, content).and_then(|()| fs::rename(&temporary, path))
        }
    }
    .map_err(failed("write", path))
}

/// Puts back what was `saved`, unless somebody else has changed the file since `written` was put there. Says whether
/// it was put back. Repeating it is harmless.
///
/// # Errors
/// [`DnsError`].
pub fn restore(path: &Path, saved: &Saved, written: &[u8]) -> Result<bool, DnsError> {
    // A crash amid our own write leaves the beginning of it.
    let ours = match save(path)? {
        Saved::File(content) => written.starts_with(&content),
        Saved::Missing | Saved::Link(_) => false,
    };
    if !ours {
        return Ok(false);
    }
    match saved {
        Saved::Missing => fs::remove_file(path),
        Saved::File(content) => write_in_place(path, content),
        Saved::Link(target) => {
            let temporary = temporary(path);
            // One that a crash has left.
            let _ = fs::remove_file(&temporary);
            symlink(target, &temporary).and_then(|()| fs::rename(&temporary, path))
        }
    }
    .map_err(failed("restore", path))?;
    Ok(true)
}

/// The content of a resolver configuration that asks `nameservers`.
pub fn resolv_conf(nameservers: &[IpAddr]) -> String {
    let mut text =
        String::from("# Written by ringtun; the original comes back when the tunnel ends.\n");
    for nameserver in nameservers {
        text.push_str(&format!("nameserver {nameserver}\n"));
    }
    text
}

/// The nameservers of this host that others may ask too: none on its own loopback, and no link-local ones.
pub fn shareable_nameservers() -> Vec<IpAddr> {
    [RESOLV_CONF, RESOLVED_UPSTREAM]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|text| nameservers(&text))
        .find(|nameservers| !nameservers.is_empty())
        .unwrap_or_default()
}

fn nameservers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse().ok())
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
            IpAddr::V6(v6) => {
                !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local()
            }
        })
        .collect()
}

fn write_in_place(path: &Path, content: &[u8]) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(path)?
        .write_all(content)
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("conf.ringtun")
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DnsError {
    move |source| DnsError {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[u8] = b"# ours\nnameserver 9.9.9.9\n";

    fn round_trip(prepare: impl Fn(&Path)) {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("resolv.conf");
        prepare(&path);
        let saved = save(&path).expect("saved");
        write(&path, &saved, OURS).expect("written");
        assert_eq!(fs::read(&path).expect("read"), OURS);
        assert!(restore(&path, &saved, OURS).expect("restored"));
        assert_eq!(save(&path).expect("saved"), saved);
        assert!(
            !restore(&path, &saved, OURS).expect("again"),
            "nothing left to do"
        );
        assert_eq!(save(&path).expect("saved"), saved);
    }

    #[test]
    fn a_file_a_link_and_nothing_come_back() {
        round_trip(|path| fs::write(path, b"nameserver 192.0.2.1\n\xff").expect("written"));
        round_trip(|_| {});
        round_trip(|path| symlink("../run/nowhere", path).expect("linked"));
        round_trip(|path| {
            let target = path.with_file_name("target");
            fs::write(&target, "nameserver 192.0.2.1\n").expect("written");
            symlink(&target, path).expect("linked");
        });
    }

    #[test]
    fn the_target_of_a_link_is_never_written() {
        let directory = tempfile::tempdir().expect("directory");
        let target = directory.path().join("target");
        let path = directory.path().join("resolv.conf");
        fs::write(&target, "theirs").expect("written");
        symlink(&target, &path).expect("linked");
        let saved = save(&path).expect("saved");
        write(&path, &saved, OURS).expect("written");
        assert_eq!(fs::read(&target).expect("read"), b"theirs");
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_stays() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.1\n").expect("written");
        let saved = save(&path).expect("saved");
        write(&path, &saved, OURS).expect("written");
        fs::write(&path, "nameserver 192.0.2.2\n").expect("by DHCP");
        assert!(!restore(&path, &saved, OURS).expect("left"));
        assert_eq!(fs::read(&path).expect("read"), b"nameserver 192.0.2.2\n");
    }

    #[test]
    fn a_write_cut_short_is_recognised_as_ours() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("resolv.conf");
        let saved = Saved::File(b"nameserver 192.0.2.1\n".to_vec());
        fs::write(&path, &OURS[..5]).expect("cut short");
        assert!(restore(&path, &saved, OURS).expect("restored"));
        assert_eq!(save(&path).expect("saved"), saved);
    }

    #[test]
    fn nameservers_that_only_this_host_reaches_are_not_shared() {
        let text = "search example.org\nnameserver 127.0.0.53\n nameserver 192.0.2.1\nnameserver ::1\n\
                    nameserver fe80::1%eth0\nnameserver fe80::1\nnameserver 2001:db8::1\n#nameserver 192.0.2.9\n";
        let expected: Vec<IpAddr> = ["192.0.2.1", "2001:db8::1"]
            .map(|address| address.parse().expect("address"))
            .into();
        assert_eq!(nameservers(text), expected);
        assert_eq!(nameservers(&resolv_conf(&expected)), expected);
    }
}
