//! Kernel settings under `/proc/sys`.
//!
//! Keys are paths (`net/ipv4/conf/eth0.5/forwarding`), because interface names may have dots in them.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::PathBuf;

const ROOT: &str = "/proc/sys";

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the kernel setting {key}: is /proc/sys read-only in this container?")]
pub struct SysctlError {
    /// `read` or `write`.
    pub what: &'static str,
    /// The key.
    pub key: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl SysctlError {
    /// Whether there is no such setting.
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// The key of a per-interface setting of one family (`ipv4` or `ipv6`).
pub fn interface_key(family: &str, interface: &str, setting: &str) -> String {
    format!("net/{family}/conf/{interface}/{setting}")
}

/// A setting's value; `None` where this kernel, or this interface, has no such setting.
///
/// # Errors
/// [`SysctlError`].
pub fn read(key: &str) -> Result<Option<String>, SysctlError> {
    match fs::read_to_string(path(key)) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysctlError {
            what: "read",
            key: key.into(),
            source,
        }),
    }
}

/// Changes a setting. What has the value already is not written, so that a read-only `/proc/sys` that was prepared
/// by somebody else is good enough.
///
/// # Errors
/// [`SysctlError`].
pub fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    if read(key)?.as_deref() == Some(value) {
        return Ok(());
    }
    fs::write(path(key), value).map_err(|source| SysctlError {
        what: "write",
        key: key.into(),
        source,
    })
}

/// Whether a setting may be changed. Nothing is changed to find out.
pub fn is_writable(key: &str) -> bool {
    OpenOptions::new().write(true).open(path(key)).is_ok()
}

fn path(key: &str) -> PathBuf {
    let path = PathBuf::from(format!("{ROOT}/{key}"));
    assert!(
        !path.components().any(|part| part.as_os_str() == ".."),
        "interface names are checked: {key}"
    );
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_an_interface_that_is_gone_is_missing() {
        let key = interface_key("ipv4", "rtgone0", "forwarding");
        assert_eq!(read(&key).unwrap(), None);
        assert!(write(&key, "1").unwrap_err().is_missing());
    }
}
