//! Both halves of a reachability test: hosts that answer with the source address that they see, and
//! questions to them with a time limit.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::host::Host;
use crate::names;
use crate::netns::NamespaceError;

/// How large a request [`Responder`] reads before it answers anyway.
const REQUEST_BYTES_MAX: usize = 8192;
/// How long [`udp`] waits for an answer before it asks again.
const REPEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How long [`Responder`] waits for a request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// What came of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// The target answered, and saw the question coming from this address.
    SawSource(IpAddr),
    /// Nothing came within the limit, or the connection was refused or broken off.
    Nothing(io::ErrorKind),
}

impl Answer {
    /// Whether the target answered.
    #[must_use]
    pub fn is_some(self) -> bool {
        matches!(self, Answer::SawSource(_))
    }
}

/// Connects from `host` to a [`Responder`]'s TCP port and asks for the source address that it sees.
///
/// # Errors
/// When the host cannot be entered.
pub fn tcp(host: &Host, to: SocketAddr, limit: Duration) -> Result<Answer, NamespaceError> {
    host.enter(|| {
        answer((|| {
            let mut stream = TcpStream::connect_timeout(&to, limit)?;
            stream.set_read_timeout(Some(limit))?;
            write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
            let mut response = String::new();
            stream
                .take(REQUEST_BYTES_MAX as u64)
                .read_to_string(&mut response)?;
            Ok(response
                .rsplit("\r\n\r\n")
                .next()
                .unwrap_or_default()
                .to_owned())
        })())
    })
}

/// Whether a TCP connection from `host` comes about at all.
///
/// # Errors
/// When the host cannot be entered.
pub fn connects(host: &Host, to: SocketAddr, limit: Duration) -> Result<bool, NamespaceError> {
    host.enter(|| TcpStream::connect_timeout(&to, limit).is_ok())
}

/// Sends a datagram from `host` to a [`Responder`]'s UDP port, and again every second while no answer comes: a single
/// one may be lost on the best of paths.
///
/// # Errors
/// When the host cannot be entered.
pub fn udp(host: &Host, to: SocketAddr, limit: Duration) -> Result<Answer, NamespaceError> {
    host.enter(|| {
        answer((|| {
            let any: IpAddr = if to.is_ipv4() {
                [0; 4].into()
            } else {
                [0; 16].into()
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(to)?;
            let deadline = Instant::now() + limit;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let wait = left.clamp(Duration::from_millis(1), REPEAT_INTERVAL);
                socket.set_read_timeout(Some(wait))?;
                socket.send(b"?")?;
                let mut response = [0; 64];
                match socket.recv(&mut response) {
                    Ok(bytes) => {
                        return Ok(String::from_utf8_lossy(&response[..bytes]).into_owned());
                    }
                    Err(error)
                        if error.kind() == io::ErrorKind::WouldBlock && left > REPEAT_INTERVAL => {}
                    Err(error) => return Err(error),
                }
            }
        })())
    })
}

fn answer(response: io::Result<String>) -> Answer {
    match response.map(|response| response.trim().parse()) {
        Ok(Ok(source)) => Answer::SawSource(source),
        Ok(Err(_)) => Answer::Nothing(io::ErrorKind::InvalidData),
        Err(error) => Answer::Nothing(error.kind()),
    }
}

/// A server inside a host that tells everyone the source address it sees: over TCP as an HTTP answer to
/// whatever is asked (`/bytes/N` is answered with N zero bytes instead), over UDP as plain text. A DNS query is
/// answered as such: every name has the server's addresses. It ends when dropped.
#[derive(Debug)]
pub struct Responder {
    /// Closing it ends the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Why a [`Responder`] did not start.
#[derive(Debug, thiserror::Error)]
pub enum ResponderError {
    /// The host could not be entered.
    #[error("the responder's host could not be entered")]
    Namespace(#[from] NamespaceError),
    /// A port could not be opened.
    #[error("the responder's sockets could not be opened")]
    Socket(#[from] io::Error),
}

impl Responder {
    /// Listens on every one of `addresses` at every one of the ports.
    ///
    /// # Errors
    /// When a port is taken or an address is not the host's.
    pub fn start(
        host: &Host,
        addresses: &[IpAddr],
        tcp_ports: &[u16],
        udp_ports: &[u16],
    ) -> Result<Responder, ResponderError> {
        // Sockets stay in the network they were opened in, so that only this has to happen inside.
        let (listeners, sockets) = host.enter(|| -> io::Result<_> {
            let mut listeners = Vec::new();
            let mut sockets = Vec::new();
            for address in addresses {
                for port in tcp_ports {
                    let listener = TcpListener::bind((*address, *port))?;
                    listener.set_nonblocking(true)?;
                    listeners.push(listener);
                }
                for port in udp_ports {
                    let socket = UdpSocket::bind((*address, *port))?;
                    socket.set_nonblocking(true)?;
                    sockets.push(socket);
                }
            }
            Ok((listeners, sockets))
        })??;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let addresses: Arc<[IpAddr]> = addresses.into();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                for listener in listeners {
                    tokio::spawn(serve_tcp(listener));
                }
                for socket in sockets {
                    tokio::spawn(serve_udp(socket, addresses.clone()));
                }
                let _ = stopped.await;
            });
        });
        Ok(Responder {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve_tcp(listener: TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        if let Ok((stream, from)) = listener.accept().await {
            tokio::spawn(async move {
                tokio::time::timeout(REQUEST_LIMIT, respond(stream, from)).await
            });
        }
    }
}

async fn respond(stream: tokio::net::TcpStream, from: SocketAddr) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n")
        && request.len() < REQUEST_BYTES_MAX
    {
        stream.readable().await?;
        let mut chunk = [0; 1024];
        match stream.try_read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(bytes) => request.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let request = String::from_utf8_lossy(&request);
    let bytes = request
        .split(' ')
        .nth(1)
        .and_then(|path| path.strip_prefix("/bytes/")?.parse::<usize>().ok());
    let body = match bytes {
        Some(bytes) => vec![0; bytes],
        None => format!("{}\n", from.ip()).into_bytes(),
    };
    let mut response = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    response.extend(body);
    let mut rest = response.as_slice();
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(bytes) => rest = &rest[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn serve_udp(socket: UdpSocket, addresses: Arc<[IpAddr]>) -> io::Result<()> {
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut datagram = [0; 2048];
    loop {
        if let Ok((bytes, from)) = socket.recv_from(&mut datagram).await {
            let response = names::answer(&datagram[..bytes], &addresses);
            let response = response.unwrap_or_else(|| from.ip().to_string().into_bytes());
            let _ = socket.send_to(&response, from).await;
        }
    }
}
