//! TLS over a [`Stream`], from the first byte until a worker takes over.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::time::Instant;

use super::runtime::Stream;
use crate::tls::handshake::{Established, TlsError, TlsStream};

/// How long a goodbye may take to be sent, and how long to wait for the peer's.
pub const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// Why a connection did not get to its tunnel, or its web page.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer did not answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// The peer closed the connection where an answer was due.
    #[error("the other side closed the connection")]
    Closed,
    /// TCP failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// TLS failed.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => StreamError::TimedOut,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => StreamError::Closed,
            _ => StreamError::Io(error),
        }
    }
}

/// A connection with TLS established.
pub struct SecureStream {
    stream: Stream,
    tls: TlsStream,
}

impl SecureStream {
    /// Handshakes as the server; `received` is what has been read already.
    ///
    /// # Errors
    /// [`StreamError`]; the peer has been told by an alert where TLS has one.
    pub async fn accept(
        stream: Stream,
        config: Arc<ServerConfig>,
        received: &[u8],
        deadline: Instant,
    ) -> Result<Self, StreamError> {
        let tls = TlsStream::server(config)?;
        SecureStream { stream, tls }
            .handshake(received, deadline)
            .await
    }

    /// Handshakes as the client.
    ///
    /// # Errors
    /// [`StreamError`]; the peer has been told by an alert where TLS has one.
    pub async fn connect(
        stream: Stream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        deadline: Instant,
    ) -> Result<Self, StreamError> {
        let tls = TlsStream::client(config, name)?;
        SecureStream { stream, tls }.handshake(&[], deadline).await
    }

    async fn handshake(mut self, received: &[u8], deadline: Instant) -> Result<Self, StreamError> {
        let mut chunk = received.to_vec();
        loop {
            if let Err(error) = self.tls.feed(&chunk) {
                return Err(self.fail(error).await);
            }
            self.flush(deadline).await?;
            if !self.tls.is_handshaking() {
                return Ok(self);
            }
            chunk.clear();
            if self.stream.read(&mut chunk, deadline).await? == 0 {
                return Err(StreamError::Closed);
            }
        }
    }

    /// Reads more plaintext; `false` when the peer has ended its stream.
    ///
    /// # Errors
    /// [`StreamError`]; after one, the stream is to be dropped.
    pub async fn read(&mut self, deadline: Instant) -> Result<bool, StreamError> {
        let before = self.tls.plaintext().len();
        while self.tls.plaintext().len() == before {
            if self.tls.peer_closed() {
                return Ok(false);
            }
            let mut chunk = Vec::new();
            if self.stream.read(&mut chunk, deadline).await? == 0 {
                return Ok(false);
            }
            if let Err(error) = self.tls.feed(&chunk) {
                return Err(self.fail(error).await);
            }
            self.flush(deadline).await?;
        }
        Ok(true)
    }

    /// What has been received; the caller takes out what it has consumed.
    pub fn plaintext(&mut self) -> &mut Vec<u8> {
        self.tls.plaintext()
    }

    /// Writes all of `plaintext`.
    ///
    /// # Errors
    /// [`StreamError`]; after one, the stream is to be dropped.
    pub async fn write(&mut self, plaintext: &[u8], deadline: Instant) -> Result<(), StreamError> {
        self.tls.write(plaintext)?;
        self.flush(deadline).await
    }

    /// Says goodbye in order and waits a little for the peer to go.
    pub async fn close(mut self) {
        self.tls.close();
        // The connection ends either way.
        if self.flush(Instant::now() + GOODBYE_TIME).await.is_ok() {
            self.stream.finish(GOODBYE_TIME).await;
        }
    }

    /// Splits into the socket and what a worker needs to go on with it.
    ///
    /// # Errors
    /// [`StreamError`]; the connection is lost.
    pub fn into_parts(self) -> Result<(OwnedFd, Established), StreamError> {
        let established = self.tls.into_records()?;
        Ok((self.stream.into_socket()?, established))
    }

    /// Tells the peer why, by an alert.
    async fn fail(&mut self, error: TlsError) -> StreamError {
        // The alert is a courtesy: the error is what counts.
        let _ = self.flush(Instant::now() + GOODBYE_TIME).await;
        error.into()
    }

    async fn flush(&mut self, deadline: Instant) -> Result<(), StreamError> {
        let outgoing = self.tls.take_outgoing();
        Ok(self.stream.write(outgoing, deadline).await?)
    }
}
