//! OpenVPN over TCP 443.

use super::certificate::Certificates;
use super::system::{DIRECTORY, Daemon, File, Setup, Skipped, forwarding, output, owned, program};
use crate::topology::SERVER_V4;

/// Says both sides.
const READY: &str = "Initialization Sequence Completed";

/// What a flavour adds to the settings that it takes to work at all.
pub(super) struct Flavour {
    remark: &'static str,
    server: &'static str,
    client: &'static str,
}

/// The sample configuration of Debian's package, with TCP 443 for UDP 1194.
pub(super) const DEFAULT: Flavour = Flavour {
    remark: "The sample configuration of Debian's package, on TCP 443. No data channel offload: the kernel has none for it.",
    server: "",
    client: "",
};

/// What is known to help over TCP. A larger tun-mtu does not: web's segments are 1460 bytes either way.
pub(super) const TUNED: Flavour = Flavour {
    remark: "No Nagle (the server pushes it to the client, too), socket buffers left to the kernel, AES-128-GCM, longer queue, no MSS clamp. \
             A larger tun-mtu changes nothing, since web sends segments of 1460 bytes either way.",
    server: "tcp-nodelay\nsndbuf 0\nrcvbuf 0\ndata-ciphers AES-128-GCM\ntxqueuelen 1000\nmssfix 0\ntun-mtu 1500\n",
    client: "tcp-nodelay\nsndbuf 0\nrcvbuf 0\ndata-ciphers AES-128-GCM\ntxqueuelen 1000\nmssfix 0\ntun-mtu 1500\n",
};

pub(super) fn setup(flavour: &Flavour) -> Result<Setup, Skipped> {
    let openvpn = program("openvpn")?;
    let certificates = Certificates::make().map_err(|error| Skipped(error.to_string()))?;
    let server = format!(
        "port 443\nproto tcp-server\ndev tun\nca ca.crt\ncert server.crt\nkey server.key\ndh none\n\
         topology subnet\nserver 10.8.0.0 255.255.255.0\npush \"redirect-gateway def1\"\nkeepalive 10 120\n\
         persist-key\npersist-tun\nverb 3\n{}",
        flavour.server
    );
    let client = format!(
        "client\ndev tun\nproto tcp-client\nremote {SERVER_V4} 443\nresolv-retry infinite\nnobind\n\
         persist-key\npersist-tun\nca ca.crt\ncert client.crt\nkey client.key\nremote-cert-tls server\nverb 3\n{}",
        flavour.client
    );
    let command = |name: &str| {
        let openvpn = openvpn.to_string_lossy();
        owned([
            &openvpn,
            "--cd",
            DIRECTORY,
            "--suppress-timestamps",
            "--config",
            name,
        ])
    };
    Ok(Setup {
        version: output(&openvpn, &["--version"])
            .unwrap_or_default()
            .lines()
            .take(2)
            .collect::<Vec<_>>()
            .join("; "),
        remark: flavour.remark.to_owned(),
        files: vec![
            File::shown("server", "server.conf", server),
            File::shown("client", "client.conf", client),
            File::secret("server", "ca.crt", certificates.authority.clone()),
            File::secret("server", "server.crt", certificates.server.certificate),
            File::secret("server", "server.key", certificates.server.key),
            File::secret("client", "ca.crt", certificates.authority),
            File::secret("client", "client.crt", certificates.client.certificate),
            File::secret("client", "client.key", certificates.client.key),
        ],
        prepare: forwarding("10.8.0.0/24"),
        server: Some(Daemon {
            command: command("server.conf"),
            ready: READY,
        }),
        client: Some(Daemon {
            command: command("client.conf"),
            ready: READY,
        }),
        ..Setup::default()
    })
}
