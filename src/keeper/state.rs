//! The server's state directory: peers, leases, the generated certificate, the IPv6 pool.
//!
//! Whoever opens the directory first, `ringtun server` or `ringtun invite`, makes what is missing, under a lock.
//! Every file is replaced as a whole, so that a reader needs no lock and a crash leaves the old or the new one.
//!
//! | file | what |
//! | --- | --- |
//! | `state.toml` | the IPv6 pool and the host name of the generated certificate; made once |
//! | `certificate.pem`, `key.pem` | the generated certificate; its key is pinned by invites |
//! | `peers.toml` | names and SHA-256 of tokens |
//! | `leases.toml` | inner addresses by peer |

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::{digest, rand};
use ipnet::Ipv6Net;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::request::{Peer, SavedLease};
use crate::tls::certificate::{self, CertificateError, Identity};

/// The file that changes when a peer is added or revoked.
pub const PEERS_FILE: &str = "peers.toml";
/// Bytes of a token, all random.
pub const TOKEN_BYTES: usize = 32;
/// The longest peer name.
pub const PEER_NAME_BYTES_MAX: usize = 64;

const STATE_FILE: &str = "state.toml";
const LEASES_FILE: &str = "leases.toml";
const CERTIFICATE_FILE: &str = "certificate.pem";
const KEY_FILE: &str = "key.pem";
const LOCK_FILE: &str = "lock";
const POOL_V6_PREFIX_BITS: u8 = 64;
/// How long a command waits for another one.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the keeper of a running server waits, which serves nothing else meanwhile.
const LOCK_TIMEOUT_SERVING: Duration = Duration::from_millis(300);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Why the state cannot be used, in one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory or a file in it cannot be made or written.
    #[error("cannot write {}: run as root, or give a directory of your own with `--state-dir`", path.display())]
    NotWritable {
        /// What could not be written.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    NotReadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file was edited into something else.
    #[error("{} is damaged ({reason}): restore it from a backup or remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says, on one line.
        reason: String,
    },
    /// The generated certificate or key is gone although invites pin it.
    #[error(
        "{} is missing, but invites rely on it: restore it from a backup, or remove {STATE_FILE} as well to start anew with new invites",
        path.display()
    )]
    CertificateGone {
        /// The file.
        path: PathBuf,
    },
    /// The list of peers is gone although peers have been connected.
    #[error(
        "{} is missing, but there are leases of peers: restore it from a backup, or remove {LEASES_FILE} as well to start without peers",
        path.display()
    )]
    PeersGone {
        /// The file.
        path: PathBuf,
    },
    /// Another process has the directory's lock and does not give it up.
    #[error(
        "another ringtun command is at work in {} and does not end: stop it",
        path.display()
    )]
    Locked {
        /// The state directory.
        path: PathBuf,
    },
    /// The certificate cannot be made or used.
    #[error("the certificate in {}", path.display())]
    Certificate {
        /// The state directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: CertificateError,
    },
    /// A name that cannot be a peer's.
    #[error(
        "{0:?} is not a name of 1 to {PEER_NAME_BYTES_MAX} letters, digits, `-`, `_`, `.` or `@` that starts with a letter or digit"
    )]
    BadPeerName(String),
    /// The peer is there already.
    #[error("{0} has an invite already: run `ringtun peers revoke {0}` first")]
    PeerExists(String),
    /// There is no such peer.
    #[error("there is no peer {0}: `ringtun peers` lists them")]
    NoSuchPeer(String),
    /// The system's random source failed.
    #[error("the system gives no random bytes")]
    NoRandom,
}

/// One peer as listed by `ringtun peers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerEntry {
    /// The name given with `ringtun invite NAME`.
    pub name: String,
    /// SHA-256 of the token, in hexadecimal.
    #[serde(with = "hex32")]
    pub token_sha256: [u8; 32],
    /// When the invite was made, in seconds since 1970.
    pub created: u64,
}

/// An open state directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    made_once: MadeOnce,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MadeOnce {
    pool_v6: Ipv6Net,
    host_name: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeersToml {
    // Always written, even when it is empty: a file without it has lost its content.
    peer: Vec<PeerEntry>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeasesToml {
    // Always written, as above.
    lease: Vec<SavedLease>,
}

impl StateDir {
    /// Opens the directory, after making it and everything in it that is missing.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(not_writable(path))?;
        let _lock = lock(path, LOCK_TIMEOUT)?;
        let made_once = match read::<MadeOnce>(&path.join(STATE_FILE))? {
            Some(made_once) => made_once,
            None => make_once(path)?,
        };
        for file in [CERTIFICATE_FILE, KEY_FILE] {
            let path = path.join(file);
            if !path.exists() {
                return Err(StateError::CertificateGone { path });
            }
        }
        Ok(StateDir {
            path: path.into(),
            made_once,
        })
    }

    /// Whether somebody has opened the directory before, so that opening it makes nothing anew.
    pub fn is_made(path: &Path) -> bool {
        path.join(STATE_FILE).exists()
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The IPv6 pool made at first start.
    pub fn pool_v6(&self) -> Ipv6Net {
        self.made_once.pool_v6
    }

    /// The host name in the generated certificate, which clients say as SNI when they know no better.
    pub fn host_name(&self) -> &str {
        &self.made_once.host_name
    }

    /// The generated certificate and its key.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn identity(&self) -> Result<Identity, StateError> {
        let read = |file: &str| {
            let path = self.path.join(file);
            fs::read(&path).map_err(|source| StateError::NotReadable { path, source })
        };
        Identity::from_pem(&read(CERTIFICATE_FILE)?, &read(KEY_FILE)?).map_err(|source| {
            StateError::Certificate {
                path: self.path.clone(),
                source,
            }
        })
    }

    /// All peers, in the order of their invites. Before the first invite there is no file, and nobody.
    ///
    /// # Errors
    /// [`StateError`], such as [`StateError::PeersGone`].
    pub fn peers(&self) -> Result<Vec<PeerEntry>, StateError> {
        let path = self.path.join(PEERS_FILE);
        if let Some(peers) = read::<PeersToml>(&path)? {
            return Ok(peers.peer);
        }
        // Only peers that were connected have leases. Leases that cannot be read are no proof that there were none.
        match self.leases() {
            Ok(leases) if leases.is_empty() => Ok(Vec::new()),
            _ => Err(StateError::PeersGone { path }),
        }
    }

    /// Whether there is a list of peers, be it good or not.
    pub fn has_peers_file(&self) -> bool {
        self.path.join(PEERS_FILE).exists()
    }

    /// Adds a peer and returns its token, which is kept nowhere.
    ///
    /// # Errors
    /// [`StateError`], such as a name that is taken.
    pub fn add_peer(&self, name: &str) -> Result<[u8; TOKEN_BYTES], StateError> {
        let tokens = self.add_peers([name])?;
        Ok(tokens[0])
    }

    /// Adds peers, all or none, and returns their tokens in the same order. The list is written once, so that thousands
    /// take no longer than one.
    ///
    /// # Errors
    /// [`StateError`], such as a name that is taken.
    pub fn add_peers<'name>(
        &self,
        names: impl IntoIterator<Item = &'name str>,
    ) -> Result<Vec<[u8; TOKEN_BYTES]>, StateError> {
        let _lock = lock(&self.path, LOCK_TIMEOUT)?;
        let mut peers = self.peers()?;
        let mut taken: HashSet<String> = peers.iter().map(|peer| peer.name.clone()).collect();
        let created = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let mut tokens = Vec::new();
        for name in names {
            check_peer_name(name)?;
            if !taken.insert(name.into()) {
                return Err(StateError::PeerExists(name.into()));
            }
            let token = random::<TOKEN_BYTES>()?;
            peers.push(PeerEntry {
                name: name.into(),
                token_sha256: token_sha256(&token),
                created,
            });
            tokens.push(token);
        }
        self.write(PEERS_FILE, &PeersToml { peer: peers })?;
        Ok(tokens)
    }

    /// Removes a peer and its lease.
    ///
    /// # Errors
    /// [`StateError`], such as a name that is not there.
    pub fn revoke_peer(&self, name: &str) -> Result<(), StateError> {
        let _lock = lock(&self.path, LOCK_TIMEOUT)?;
        let mut peers = self.peers()?;
        let before = peers.len();
        peers.retain(|peer| peer.name != name);
        if peers.len() == before {
            return Err(StateError::NoSuchPeer(name.into()));
        }
        self.write(PEERS_FILE, &PeersToml { peer: peers })?;
        let mut leases = self.leases()?;
        leases.retain(|lease| lease.peer != name);
        self.write(LEASES_FILE, &LeasesToml { lease: leases })
    }

    /// All leases.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn leases(&self) -> Result<Vec<SavedLease>, StateError> {
        let leases: Option<LeasesToml> = read(&self.path.join(LEASES_FILE))?;
        Ok(leases.unwrap_or_default().lease)
    }

    /// Remembers peers' addresses, in place of those they had, and of whoever had them. The list is written once.
    ///
    /// # Errors
    /// [`StateError`], such as a peer that is not there; nothing is remembered then.
    pub fn save_leases(&self, new: &[SavedLease]) -> Result<(), StateError> {
        let _lock = lock(&self.path, LOCK_TIMEOUT_SERVING)?;
        let peers = self.peers()?;
        let known: HashSet<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
        if let Some(lease) = new.iter().find(|lease| !known.contains(&lease.peer[..])) {
            return Err(StateError::NoSuchPeer(lease.peer.clone()));
        }
        let mut leases = self.leases()?;
        leases.extend_from_slice(new);
        // From the newest on: whatever shares something with a newer one goes.
        let (mut holders, mut taken_v4, mut taken_v6) =
            (HashSet::new(), HashSet::new(), HashSet::new());
        let mut kept: Vec<SavedLease> = leases
            .into_iter()
            .rev()
            .filter(|lease| {
                let is_free = !holders.contains(&lease.peer)
                    && !taken_v4.contains(&lease.v4)
                    && !taken_v6.contains(&lease.v6);
                if is_free {
                    holders.insert(lease.peer.clone());
                    taken_v4.insert(lease.v4);
                    taken_v6.insert(lease.v6);
                }
                is_free
            })
            .collect();
        kept.reverse();
        self.write(LEASES_FILE, &LeasesToml { lease: kept })
    }

    fn write(&self, file: &str, content: &impl Serialize) -> Result<(), StateError> {
        let text = toml::to_string(content).expect("tables of strings and numbers are TOML");
        replace(&self.path.join(file), text.as_bytes())
    }
}

impl From<PeerEntry> for Peer {
    fn from(entry: PeerEntry) -> Self {
        Peer {
            name: entry.name,
            token_sha256: entry.token_sha256,
        }
    }
}

/// What the server keeps of a token.
pub fn token_sha256(token: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
    sum
}

/// Makes what a first start makes. `state.toml` comes last: it says that the rest is complete.
fn make_once(path: &Path) -> Result<MadeOnce, StateError> {
    let made_once = MadeOnce {
        pool_v6: random_pool_v6()?,
        host_name: random_host_name()?,
    };
    let generated =
        certificate::generate(&made_once.host_name).map_err(|source| StateError::Certificate {
            path: path.into(),
            source,
        })?;
    replace(&path.join(KEY_FILE), generated.key_pem.as_bytes())?;
    replace(
        &path.join(CERTIFICATE_FILE),
        generated.certificate_pem.as_bytes(),
    )?;
    let text = toml::to_string(&made_once).expect("two strings are TOML");
    replace(&path.join(STATE_FILE), text.as_bytes())?;
    Ok(made_once)
}

/// A unique local prefix with 40 random bits (RFC 4193, section 3.2).
fn random_pool_v6() -> Result<Ipv6Net, StateError> {
    let random = random::<5>()?;
    let mut address = [0; 16];
    address[0] = 0xfd;
    address[1..6].copy_from_slice(&random);
    Ok(Ipv6Net::new_assert(
        Ipv6Addr::from(address),
        POOL_V6_PREFIX_BITS,
    ))
}

/// A host name like any other: a certificate for a random string would stand out to who looks at handshakes.
fn random_host_name() -> Result<String, StateError> {
    const FIRST: [&str; 32] = [
        "amber", "birch", "blue", "bright", "cedar", "clear", "copper", "coral", "crest", "delta",
        "ember", "field", "forest", "garden", "granite", "green", "harbor", "hazel", "ivory",
        "lake", "maple", "meadow", "north", "ocean", "olive", "pine", "river", "silver", "stone",
        "summit", "west", "willow",
    ];
    const SECOND: [&str; 32] = [
        "arts", "bakery", "books", "bridge", "craft", "design", "digital", "garage", "gallery",
        "hill", "house", "kitchen", "labs", "leaf", "light", "line", "market", "media", "mill",
        "music", "notes", "photo", "point", "press", "print", "school", "shop", "studio", "travel",
        "view", "works", "yard",
    ];
    const LAST: [&str; 4] = ["com", "net", "org", "com"];
    let [first, second, last] = random::<3>()?;
    let pick =
        |words: &'static [&'static str], random: u8| words[usize::from(random) % words.len()];
    Ok(format!(
        "www.{}{}.{}",
        pick(&FIRST, first),
        pick(&SECOND, second),
        pick(&LAST, last)
    ))
}

fn random<const BYTES: usize>() -> Result<[u8; BYTES], StateError> {
    let mut bytes = [0; BYTES];
    rand::fill(&mut bytes).map_err(|_| StateError::NoRandom)?;
    Ok(bytes)
}

fn check_peer_name(name: &str) -> Result<(), StateError> {
    let good = (1..=PEER_NAME_BYTES_MAX).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte));
    if good {
        Ok(())
    } else {
        Err(StateError::BadPeerName(name.into()))
    }
}

/// Waits for the lock no longer than `timeout`: its holder may have been stopped by SIGSTOP.
fn lock(directory: &Path, timeout: Duration) -> Result<Flock<File>, StateError> {
    let path = directory.join(LOCK_FILE);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(not_writable(&path))?;
    let deadline = Instant::now() + timeout;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => {
                file = again;
                thread::sleep(LOCK_POLL_INTERVAL);
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(StateError::Locked {
                    path: directory.into(),
                });
            }
            Err((_, error)) => return Err(not_writable(&path)(error.into())),
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(StateError::NotReadable {
                path: path.into(),
                source,
            });
        }
    };
    let damaged = |reason: String| StateError::Damaged {
        path: path.into(),
        reason,
    };
    // A power cut or a full disk may leave that behind, and an empty table is valid TOML.
    if text.trim().is_empty() {
        return Err(damaged("it is empty".into()));
    }
    toml::from_str(&text)
        .map(Some)
        .map_err(|error| damaged(error.message().replace('\n', " ")))
}

/// Replaces a file as a whole. The caller holds the lock, so that nobody else writes the temporary one. After an error
/// the old file is there; after a power cut the old or the new one.
fn replace(path: &Path, content: &[u8]) -> Result<(), StateError> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        // Before the rename: otherwise a power cut may leave an empty file under the new name.
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The rename itself is in the directory.
        path.parent().map_or(Ok(()), |directory| {
            File::open(directory).and_then(|directory| directory.sync_all())
        })
    };
    write().map_err(|source| {
        // On a full disk it would only take room.
        let _ = fs::remove_file(&temporary);
        not_writable(path)(source)
    })
}

fn not_writable(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::NotWritable { path, source }
}

/// 32 bytes as 64 hexadecimal digits.
mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&digits)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let digits = String::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() || !digits.bytes().all(|d| d.is_ascii_hexdigit()) {
            return Err(D::Error::custom("64 hexadecimal digits are needed"));
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(D::Error::custom)?;
            *byte = u8::from_str_radix(pair, 16).map_err(D::Error::custom)?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn lease(peer: &str, last: u8) -> SavedLease {
        SavedLease {
            peer: peer.into(),
            v4: [10, 87, 0, last].into(),
            v6: [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
        }
    }

    #[test]
    fn concurrent_first_opens_agree() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("state");
        let opened: Vec<StateDir> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| StateDir::open(&path).expect("opened")))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("joined"))
                .collect()
        });
        let pin = |state: &StateDir| {
            state.identity().and_then(|identity| {
                identity.pin().map_err(|source| StateError::Certificate {
                    path: path.clone(),
                    source,
                })
            })
        };
        let first = pin(&opened[0]).expect("pin");
        for state in &opened {
            assert_eq!(state.pool_v6(), opened[0].pool_v6());
            assert_eq!(state.host_name(), opened[0].host_name());
            assert_eq!(pin(state).expect("pin"), first);
        }
        assert_eq!(opened[0].pool_v6().addr().octets()[0], 0xfd);
        for (entry, mode) in [(KEY_FILE, 0o600), (".", 0o700)] {
            let metadata = fs::metadata(path.join(entry)).expect("metadata");
            assert_eq!(metadata.permissions().mode() & 0o777, mode, "{entry}");
        }
    }

    #[test]
    fn peers_are_added_listed_and_revoked() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        assert!(state.peers().expect("peers").is_empty());
        let token = state.add_peer("alice").expect("added");
        assert!(matches!(
            state.add_peer("alice"),
            Err(StateError::PeerExists(_))
        ));
        state.add_peer("bob").expect("added");

        let again = StateDir::open(directory.path()).expect("opened");
        let peers = again.peers().expect("peers");
        assert_eq!(
            peers.iter().map(|peer| &peer.name[..]).collect::<Vec<_>>(),
            ["alice", "bob"]
        );
        assert_eq!(peers[0].token_sha256, token_sha256(&token));
        let text = fs::read_to_string(directory.path().join(PEERS_FILE)).expect("text");
        assert!(
            !text
                .as_bytes()
                .windows(TOKEN_BYTES)
                .any(|window| window == token)
        );

        again.revoke_peer("alice").expect("revoked");
        assert_eq!(state.peers().expect("peers").len(), 1);
        assert!(matches!(
            state.revoke_peer("alice"),
            Err(StateError::NoSuchPeer(_))
        ));
    }

    #[test]
    fn many_peers_are_added_all_or_none() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        state.add_peer("bob").expect("added");
        for taken in [["alice", "bob"], ["alice", "alice"], ["alice", "a b"]] {
            state.add_peers(taken).expect_err("not all of them");
            assert_eq!(state.peers().expect("peers").len(), 1);
        }
        let tokens = state.add_peers(["alice", "carol"]).expect("added");
        let peers = state.peers().expect("peers");
        let names: Vec<_> = peers.iter().map(|peer| &peer.name[..]).collect();
        assert_eq!(names, ["bob", "alice", "carol"]);
        for (peer, token) in peers[1..].iter().zip(&tokens) {
            assert_eq!(peer.token_sha256, token_sha256(token));
        }
    }

    #[test]
    fn a_lease_has_one_holder() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        assert!(matches!(
            state.save_leases(&[lease("alice", 2)]),
            Err(StateError::NoSuchPeer(_))
        ));
        state.add_peer("alice").expect("added");
        state.add_peer("bob").expect("added");
        assert!(matches!(
            state.save_leases(&[lease("alice", 2), lease("carol", 3)]),
            Err(StateError::NoSuchPeer(_))
        ));
        assert!(state.leases().expect("leases").is_empty());
        state.save_leases(&[lease("alice", 2)]).expect("saved");
        state.save_leases(&[lease("alice", 3)]).expect("saved");
        assert_eq!(state.leases().expect("leases"), [lease("alice", 3)]);
        state.save_leases(&[lease("bob", 3)]).expect("saved");
        assert_eq!(state.leases().expect("leases"), [lease("bob", 3)]);
        let both = [lease("alice", 4), lease("bob", 2), lease("bob", 5)];
        state.save_leases(&both).expect("saved");
        assert_eq!(
            state.leases().expect("leases"),
            [lease("alice", 4), lease("bob", 5)]
        );
        state.revoke_peer("bob").expect("revoked");
        assert_eq!(state.leases().expect("leases"), [lease("alice", 4)]);
    }

    #[test]
    fn names_that_could_be_mistaken_are_refused() {
        for name in ["", "-rf", "a b", "a/b", "ä", ".hidden", &"x".repeat(65)] {
            assert!(check_peer_name(name).is_err(), "{name:?}");
        }
        for name in ["alice", "alice@laptop", "7", "a.b-c_d"] {
            assert!(check_peer_name(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn an_empty_file_is_damaged() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        for content in ["", " \n\t\n", "# nothing else\n"] {
            for file in [PEERS_FILE, LEASES_FILE] {
                fs::write(directory.path().join(file), content).expect("written");
            }
            let errors = [
                state.peers().expect_err("damaged peers"),
                state.leases().expect_err("damaged leases"),
            ];
            for error in errors {
                assert!(matches!(error, StateError::Damaged { .. }), "{error}");
            }
        }
        fs::write(directory.path().join(STATE_FILE), "").expect("written");
        let error = StateDir::open(directory.path()).expect_err("damaged");
        assert!(error.to_string().contains("it is empty"), "{error}");
    }

    #[test]
    fn a_lock_that_is_never_given_up_holds_no_server_up() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        state.add_peer("alice").expect("added");
        let held = lock(directory.path(), LOCK_TIMEOUT).expect("locked");
        let error = state.save_leases(&[lease("alice", 2)]).expect_err("locked");
        assert!(matches!(error, StateError::Locked { .. }), "{error}");
        drop(held);
        state.save_leases(&[lease("alice", 2)]).expect("saved");
    }

    #[test]
    fn revoking_the_last_peer_leaves_an_explicit_list() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        state.add_peer("alice").expect("added");
        state.save_leases(&[lease("alice", 2)]).expect("saved");
        state.revoke_peer("alice").expect("revoked");
        assert!(state.has_peers_file());
        assert_eq!(state.peers().expect("peers"), []);
        assert_eq!(state.leases().expect("leases"), []);
    }

    #[test]
    fn missing_peers_are_nobody_only_without_leases() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        assert_eq!(state.peers().expect("peers"), []);
        state.add_peer("alice").expect("added");
        state.save_leases(&[lease("alice", 2)]).expect("saved");
        fs::remove_file(directory.path().join(PEERS_FILE)).expect("removed");
        assert!(matches!(state.peers(), Err(StateError::PeersGone { .. })));
        // Adding one would make a list of one, and revoke all others.
        assert!(matches!(
            state.add_peer("bob"),
            Err(StateError::PeersGone { .. })
        ));
        fs::write(directory.path().join(LEASES_FILE), "").expect("written");
        assert!(matches!(state.peers(), Err(StateError::PeersGone { .. })));
        fs::remove_file(directory.path().join(LEASES_FILE)).expect("removed");
        assert_eq!(state.peers().expect("peers"), []);
    }

    /// A file system of a few pages, in a mount namespace of this thread alone.
    fn on_a_tiny_disk<T: Send>(run: impl FnOnce(&Path) -> T + Send) -> T {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        let directory = tempfile::tempdir().expect("directory");
        let on = directory.path();
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // CLONE_FS is implied, so that no other thread is affected.
                unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root");
                let none: Option<&str> = None;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(none, "/", none, private, none).expect("private mounts");
                let size = Some("size=32k");
                mount(Some("tmpfs"), on, Some("tmpfs"), MsFlags::empty(), size).expect("a tmpfs");
                run(on)
            });
            thread.join().expect("the test")
        })
    }

    #[test]
    fn a_full_disk_leaves_the_old_list() {
        on_a_tiny_disk(|path| {
            let state = StateDir::open(path).expect("opened");
            state.add_peer("alice").expect("added");
            let before = fs::read(path.join(PEERS_FILE)).expect("a list");
            let names: Vec<String> = (0..1000).map(|number| format!("peer{number}")).collect();
            // The first part of the new list still fits.
            let error = state
                .add_peers(names.iter().map(String::as_str))
                .expect_err("no room");
            assert!(matches!(error, StateError::NotWritable { .. }), "{error}");
            assert_eq!(fs::read(path.join(PEERS_FILE)).expect("a list"), before);
            assert!(!path.join("peers.new").exists(), "it would take room");
            // Not even one byte.
            let _ = fs::write(path.join("filler"), vec![0; 64 * 1024]);
            state.add_peer("bob").expect_err("no room");
            assert_eq!(fs::read(path.join(PEERS_FILE)).expect("a list"), before);
            fs::remove_file(path.join("filler")).expect("removed");
            state.add_peer("bob").expect("room again");
        });
    }

    #[test]
    fn damage_is_told_with_the_file_and_not_papered_over() {
        let directory = tempfile::tempdir().expect("directory");
        let state = StateDir::open(directory.path()).expect("opened");
        fs::write(directory.path().join(PEERS_FILE), "[[peer]]\nname = 3\n").expect("written");
        let error = state.peers().expect_err("damaged").to_string();
        assert!(
            error.contains(PEERS_FILE) && !error.contains('\n'),
            "{error}"
        );

        fs::remove_file(directory.path().join(KEY_FILE)).expect("removed");
        assert!(matches!(
            StateDir::open(directory.path()),
            Err(StateError::CertificateGone { .. })
        ));
    }
}
