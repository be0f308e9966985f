//! TUN interfaces: made with several queues and offloads (`drivers/net/tun.c`).
#![expect(unsafe_code, reason = "the TUN ioctls have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use tun::AbstractDevice;

use super::sysctl;

/// Where the kernel's TUN driver is reached.
pub const TUN_DEVICE_PATH: &str = "/dev/net/tun";
/// Bytes of `virtio_net_hdr` in front of every packet, without the `num_buffers` field.
pub const VNET_HDR_BYTES: i32 = 10;
/// Queues of one interface (MAX_TAP_QUEUES of the kernel is 256).
pub const QUEUES_MAX: usize = 64;

/// Offloads to ask for, best first; the first that the kernel takes is used (USO came with 6.2).
pub const OFFLOAD_LADDER: [u32; 4] = [
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
    TUN_F_CSUM,
    0,
];

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Why there is no interface.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The driver is not there.
    #[error(
        "{TUN_DEVICE_PATH} is missing: run `modprobe tun`, or give the container `--device {TUN_DEVICE_PATH}`"
    )]
    NoDriver(#[source] io::Error),
    /// The device file's permissions.
    #[error(
        "not allowed to open {TUN_DEVICE_PATH}: run as root or `chmod 666` it; in a container, give it `--device {TUN_DEVICE_PATH}`"
    )]
    DriverNotPermitted(#[source] io::Error),
    /// The process may not make interfaces.
    #[error(
        "not allowed to create the interface {name}: run as root or with CAP_NET_ADMIN (in a container: `--cap-add NET_ADMIN`)"
    )]
    NotPermitted {
        /// The interface.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another interface has the name.
    #[error(
        "the interface {0} exists already: choose another name with `interface` in the configuration"
    )]
    NameInUse(String),
    /// Anything else.
    #[error("cannot {what} the interface {name}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The interface.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// An interface that exists for as long as a queue of it is open.
#[derive(Debug)]
pub struct Tun {
    /// Its queues, non-blocking, each read and written as `virtio_net_hdr` + IP packet.
    pub queues: Vec<OwnedFd>,
    /// The TUN_F_* flags that the kernel accepted: what may be read from it unsegmented.
    pub offload_flags: u32,
}

/// Makes the interface `name` with `queues` queues, sets its MTU and brings it up. It has no address then, not even an
/// IPv6 link-local one. Without `offload` it gives and takes nothing but whole packets of up to its MTU.
///
/// # Errors
/// [`TunError`]; nothing is left behind then.
pub fn create(name: &str, mtu: u16, queues: usize, offload: bool) -> Result<Tun, TunError> {
    assert!((1..=QUEUES_MAX).contains(&queues), "{queues} queues");
    if nix::net::if_::if_nametoindex(name).is_ok() {
        return Err(TunError::NameInUse(name.into()));
    }
    let queues: Vec<OwnedFd> = (0..queues)
        .map(|_| open_queue(name, queues > 1))
        .collect::<Result<_, _>>()?;
    let failed = |what| {
        move |source| TunError::Failed {
            what,
            name: name.into(),
            source,
        }
    };
    for queue in &queues {
        set_framing(queue).map_err(failed("set the framing of"))?;
    }
    let offload_flags = OFFLOAD_LADDER
        .into_iter()
        .filter(|flags| offload || *flags == 0)
        .find(|flags| {
            // SAFETY: TUNSETOFFLOAD takes its argument by value; the queue is open.
            unsafe { ioctl::tunsetoffload(queues[0].as_raw_fd(), *flags as libc::c_int) }.is_ok()
        })
        .unwrap_or(0);
    keep_ipv6_quiet(name);
    bring_up(&queues[0], name, mtu).map_err(failed("bring up"))?;
    Ok(Tun {
        queues,
        offload_flags,
    })
}

fn open_queue(name: &str, multi_queue: bool) -> Result<OwnedFd, TunError> {
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN_DEVICE_PATH)
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => TunError::DriverNotPermitted(source),
            _ => TunError::NoDriver(source),
        })?;
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let request = InterfaceRequest::new(name, flags as libc::c_short);
    // SAFETY: `request` has the layout and size of struct ifreq and outlives the call, which only reads and writes it.
    match unsafe { ioctl::tunsetiff(device.as_raw_fd(), &request) } {
        Ok(_) => Ok(device.into()),
        Err(Errno::EPERM) => Err(TunError::NotPermitted {
            name: name.into(),
            source: Errno::EPERM.into(),
        }),
        Err(Errno::EBUSY) => Err(TunError::NameInUse(name.into())),
        Err(error) => Err(TunError::Failed {
            what: "create",
            name: name.into(),
            source: error.into(),
        }),
    }
}

fn set_framing(queue: &OwnedFd) -> io::Result<()> {
    let little_endian = 1;
    // SAFETY: both ioctls read one int behind the pointer; both ints outlive the calls.
    unsafe {
        ioctl::tunsetvnethdrsz(queue.as_raw_fd(), &VNET_HDR_BYTES)?;
        ioctl::tunsetvnetle(queue.as_raw_fd(), &little_endian)?;
    }
    Ok(())
}

/// No address of its own making, and no router at the other end that would be believed. Before the interface is up,
/// or it has a link-local address already.
fn keep_ipv6_quiet(name: &str) {
    for (setting, value) in [("addr_gen_mode", "1"), ("accept_ra", "0")] {
        let key = sysctl::interface_key("ipv6", name, setting);
        match sysctl::read(&key).and_then(|present| match present {
            Some(_) => sysctl::write(&key, value),
            None => Ok(()),
        }) {
            Ok(()) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }
}

/// The MTU and the up flag are set by the crate `tun`, around a queue that stays ours.
fn bring_up(queue: &OwnedFd, name: &str, mtu: u16) -> io::Result<()> {
    let mut config = tun::Configuration::default();
    config
        .raw_fd(queue.as_raw_fd())
        .close_fd_on_drop(false)
        .tun_name(name)
        .mtu(mtu);
    let mut device = tun::Device::new(&config)?;
    device.set_mtu(mtu)?;
    device.enabled(true)?;
    Ok(())
}

/// `struct ifreq` with the flags member of its union in use.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; IFREQ_UNION_BYTES - size_of::<libc::c_short>()],
}

const IFREQ_UNION_BYTES: usize = size_of::<libc::ifreq>() - libc::IFNAMSIZ;
const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(interface: &str, flags: libc::c_short) -> Self {
        assert!(
            interface.len() < libc::IFNAMSIZ,
            "the configuration bounds names"
        );
        let mut name = [0; libc::IFNAMSIZ];
        name[..interface.len()].copy_from_slice(interface.as_bytes());
        InterfaceRequest {
            name,
            flags,
            rest: [0; IFREQ_UNION_BYTES - size_of::<libc::c_short>()],
        }
    }
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        super::InterfaceRequest
    );
    // The argument is a value, not a pointer.
    nix::ioctl_write_int_bad!(
        tunsetoffload,
        nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>())
    );
    nix::ioctl_write_ptr!(tunsetvnethdrsz, b'T', 216, libc::c_int);
    nix::ioctl_write_ptr!(tunsetvnetle, b'T', 220, libc::c_int);
}
