//! What stands in for the server: it takes all bytes and throws them away.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use super::HostileError;
use super::bytes::BULK_PORT;
use crate::host::Host;

/// One read takes this much at most.
const READ_BYTES: usize = 16 * 1024;

/// A TCP and a UDP port on a host. They are closed when this is dropped.
#[derive(Debug)]
pub(super) struct Sink {
    /// Closing it ends the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Listens on `port` of an address of the host.
    pub(super) fn start(host: &Host, address: Ipv4Addr, port: u16) -> Result<Sink, HostileError> {
        // Sockets stay in the network that they were opened in.
        let opened = host.enter(|| -> io::Result<_> {
            let listener = TcpListener::bind((address, port))?;
            listener.set_nonblocking(true)?;
            let datagrams = UdpSocket::bind((address, BULK_PORT))?;
            datagrams.set_nonblocking(true)?;
            Ok((listener, datagrams))
        })?;
        let (listener, datagrams) = opened.map_err(HostileError::Socket)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(HostileError::Socket)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                tokio::spawn(serve(listener));
                tokio::spawn(swallow_datagrams(datagrams));
                let _ = stopped.await;
            });
        });
        Ok(Sink {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(swallow(stream));
        }
    }
}

async fn swallow(stream: tokio::net::TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn swallow_datagrams(socket: UdpSocket) -> io::Result<()> {
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        // An error of one datagram ends nothing.
        let _ = socket.recv_from(&mut buffer).await;
    }
}
