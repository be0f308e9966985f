//! Carries plans out on the host, recording the opposite of every step before it is made.

use std::path::Path;

use super::plan::{Host, Step, Tunnel, settings_observed};
use super::undo::{Record, Undo, UndoError};
use crate::sys::dns::{self, DnsError};
use crate::sys::nft::{self, NftError};
use crate::sys::route::{Netlink, OwnRoute, Route, RouteError};
use crate::sys::sysctl::{self, SysctlError};

/// Why a step could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Interfaces, addresses, routes.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Kernel settings.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The packet filter.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The resolver.
    #[error(transparent)]
    Dns(#[from] DnsError),
    /// The record of changes.
    #[error(transparent)]
    Record(#[from] UndoError),
}

/// The host with our changes on it. What is still there when it is dropped is undone then.
#[derive(Debug)]
pub struct Changes {
    netlink: Netlink,
    record: Record,
    // What is applied now, in order, with the opposite of each.
    applied: Vec<(Step, Option<Undo>)>,
    found_leftovers: bool,
    is_finished: bool,
}

impl Changes {
    /// Starts on a host without changes of ours. What a killed predecessor left is undone first, except for the table
    /// `adopted`, which the caller is going to replace.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn start(mut record: Record, adopted: Option<&str>) -> Result<Self, ApplyError> {
        let netlink = Netlink::open()?;
        let found_leftovers = !record.is_empty();
        if found_leftovers {
            tracing::info!("undoing what an earlier run has left");
            record.undo_all_but(adopted, &netlink)?;
        }
        Ok(Changes {
            netlink,
            record,
            applied: Vec::new(),
            found_leftovers,
            is_finished: false,
        })
    }

    /// Whether a killed predecessor had left something.
    pub fn found_leftovers(&self) -> bool {
        self.found_leftovers
    }

    /// The run files of this run.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// All routes now.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn routes(&self) -> Result<Vec<Route>, ApplyError> {
        Ok(self.netlink.routes()?)
    }

    /// What the host looks like now.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn observe(&self) -> Result<Host, ApplyError> {
        observe(&self.netlink)
    }

    /// Records that the tunnel's interface is about to be made.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn interface_is_coming(&mut self, name: &str) -> Result<(), ApplyError> {
        Ok(self.record.push(Undo::DeleteInterface(name.into()))?)
    }

    /// Makes the host as `wanted` says: undoes what is applied and not wanted, the last first, then applies what is
    /// wanted and missing, in order.
    ///
    /// # Errors
    /// The first step that failed; those before it stay.
    pub fn reach(&mut self, tunnel: &Tunnel, wanted: &[Step]) -> Result<(), ApplyError> {
        let mut kept = Vec::new();
        while let Some((step, undo)) = self.applied.pop() {
            if wanted.contains(&step) {
                kept.push((step, undo));
            } else if let Some(undo) = undo
                && let Err(error) = self.record.undo_one(&self.netlink, &undo)
            {
                tracing::warn!("{error}");
            }
        }
        kept.reverse();
        self.applied = kept;
        for step in wanted {
            if !self.applied.iter().any(|(applied, _)| applied == step) {
                let undo = self.apply(tunnel, step)?;
                self.applied.push((step.clone(), undo));
            }
        }
        Ok(())
    }

    /// Adds a route beside the steps that were reached.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn add_route(&mut self, route: &OwnRoute) -> Result<(), ApplyError> {
        self.record.push(Undo::DeleteRoute(route.destination))?;
        Ok(self.netlink.add_route(route)?)
    }

    /// Changes a route that [`Changes::add_route`] has added, or adds it again after the kernel dropped it.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn change_route(&mut self, route: &OwnRoute) -> Result<(), ApplyError> {
        Ok(self.netlink.change_route(route)?)
    }

    /// Removes a route that [`Changes::add_route`] has made.
    ///
    /// # Errors
    /// One line.
    pub fn delete_route(&mut self, route: &OwnRoute) -> Result<(), String> {
        self.record
            .undo_one(&self.netlink, &Undo::DeleteRoute(route.destination))
    }

    /// Undoes everything and gives the claim on the interface name back.
    ///
    /// # Errors
    /// [`UndoError::Incomplete`]; what could not be undone stays on the record.
    pub fn undo_all(mut self) -> Result<(), UndoError> {
        self.is_finished = true;
        self.record.undo_all(&self.netlink)
    }

    fn apply(&mut self, tunnel: &Tunnel, step: &Step) -> Result<Option<Undo>, ApplyError> {
        let undo = self.opposite(tunnel, step)?;
        if let Some(undo) = &undo {
            self.record.push(undo.clone())?;
        }
        match (step, &undo) {
            (Step::Setting { key, value }, _) => sysctl::write(key, value)?,
            (Step::PreferredSetting { key, value }, _) => {
                if let Err(error) = sysctl::write(key, value) {
                    tracing::debug!("{error}");
                }
            }
            (Step::KeepSetting { .. }, _) => {}
            (Step::Address(address), _) => self.netlink.add_address(tunnel.index, *address)?,
            (Step::Route(route), _) => self.netlink.add_route(route)?,
            (
                Step::Table {
                    ruleset, fallback, ..
                },
                _,
            ) => match nft::apply(ruleset) {
                Err(NftError::Refused(reason)) => {
                    nft::apply(fallback)?;
                    tracing::warn!(
                        "strangers may fill the connection tracking table: no short timeouts here ({reason})"
                    );
                }
                applied => applied?,
            },
            (Step::ResolvConf(content), Some(Undo::RestoreResolvConf { before, .. })) => {
                dns::write(Path::new(dns::RESOLV_CONF), before, content.as_bytes())?;
            }
            (Step::ResolvConf(_), _) => unreachable!("its opposite is made below"),
        }
        Ok(undo)
    }

    /// `None` where there is nothing to take back, because the host is so already.
    fn opposite(&self, tunnel: &Tunnel, step: &Step) -> Result<Option<Undo>, ApplyError> {
        Ok(match step {
            Step::Setting { key, value } => restored(key, value)?,
            Step::PreferredSetting { key, value } => restored(key, value)?,
            Step::KeepSetting { key } => sysctl::read(key)?.map(|before| Undo::RestoreSetting {
                key: key.clone(),
                before,
                ours: None,
            }),
            Step::Address(address) => Some(Undo::DeleteAddress {
                interface: tunnel.name.clone(),
                address: *address,
            }),
            Step::Route(route) => Some(Undo::DeleteRoute(route.destination)),
            Step::Table { name, .. } => Some(Undo::DeleteTable(name.clone())),
            Step::ResolvConf(content) => Some(Undo::RestoreResolvConf {
                before: dns::save(Path::new(dns::RESOLV_CONF))?,
                ours: content.clone(),
            }),
        })
    }
}

/// What the host looks like now.
///
/// # Errors
/// [`ApplyError`].
pub fn observe(netlink: &Netlink) -> Result<Host, ApplyError> {
    let interfaces = netlink.interfaces()?;
    let mut host = Host {
        routes: netlink.routes()?,
        learned_ipv6: netlink.interfaces_with_learned_ipv6()?,
        ..Host::default()
    };
    for key in settings_observed(&interfaces) {
        if let Some(value) = sysctl::read(&key)? {
            host.settings.insert(key, value);
        }
    }
    host.interfaces = interfaces;
    Ok(host)
}

/// `None` where a setting has the value already.
fn restored(key: &str, value: &str) -> Result<Option<Undo>, SysctlError> {
    let before = sysctl::read(key)?.filter(|before| before != value);
    Ok(before.map(|before| Undo::RestoreSetting {
        key: key.into(),
        before,
        ours: Some(value.into()),
    }))
}

impl Drop for Changes {
    fn drop(&mut self) {
        if !self.is_finished
            && let Err(error) = self.record.undo_all(&self.netlink)
        {
            tracing::error!("{error}");
        }
        self.record.remove_if_empty();
    }
}
