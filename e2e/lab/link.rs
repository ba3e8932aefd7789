//! A line of a given rate between two QEMUs. In: where the target listens, a rate. Out: a socket for the source.
//!
//! What QEMU sends is carried in pieces of at most 64 KiB, each as long under way as the rate says, by deadlines that do not
//! drift. The return path is not paced. A unix socket holds at most what its sender's buffer holds, 208 KiB by default: 2 ms
//! at 100 MiB/s.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use migvisor::{dryrun::pace::Pace, model::units::BytesPerSecond};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::oneshot,
    time::{Instant, sleep_until},
};

const PIECE: usize = 64 << 10;

/// The line. It goes down when dropped.
#[derive(Debug)]
pub struct Link {
    socket: PathBuf,
    #[expect(dead_code, reason = "dropping it ends the thread")]
    down: oneshot::Sender<()>,
}

impl Link {
    /// Listens at `socket` and carries everything to `target` at `rate`, in a thread of its own: a busy test cannot slow it.
    pub fn start(socket: &Path, target: &Path, rate: BytesPerSecond) -> Result<Self> {
        ensure!(rate.0 > 0, "a link needs a rate");
        let (down, dropped) = oneshot::channel::<()>();
        let listener =
            std::os::unix::net::UnixListener::bind(socket).with_context(|| format!("listening at {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let target = target.to_owned();
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, &target, rate) => {}
                    _ = dropped => {}
                }
            });
        });
        Ok(Self { socket: socket.to_owned(), down })
    }

    /// Where the source connects.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

async fn serve(listener: std::os::unix::net::UnixListener, target: &Path, rate: BytesPerSecond) {
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    while let Ok((source, _)) = listener.accept().await {
        let Ok(target) = UnixStream::connect(target).await else { continue };
        tokio::spawn(carry(source, target, rate));
    }
}

async fn carry(source: UnixStream, target: UnixStream, rate: BytesPerSecond) {
    let (from_source, mut to_source) = source.into_split();
    let (mut from_target, to_target) = target.into_split();
    let back = tokio::spawn(async move { tokio::io::copy(&mut from_target, &mut to_source).await });
    // A broken end ends both: QEMU sees a lost connection, as on a real line.
    let _ = pace(from_source, to_target, rate).await;
    back.abort();
}

async fn pace(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, rate: BytesPerSecond) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut line = Pace::new(rate, Instant::now().into_std());
    loop {
        let length = from.read(&mut piece).await?;
        let Some(data) = piece.get(..length).filter(|data| !data.is_empty()) else { return to.shutdown().await };
        sleep_until(line.carry(length, Instant::now().into_std()).into()).await;
        to.write_all(data).await?;
    }
}
