//! Asks the server, on a thread of its own.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::Method;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};

use super::{Update, WatchError, WatchOptions};
use crate::api::client::{ClientError, call, events, request};

/// How long an answer may take; the server itself waits a quarter of a second for a guest.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it takes to look for a server again that was not there.
const RETRY: Duration = Duration::from_secs(1);

/// Ends when it is dropped.
pub(super) struct Feed {
    /// What has been found out.
    pub(super) updates: mpsc::Receiver<Update>,
    sizes: Option<UnboundedSender<u64>>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Asks the server once in each interval, and listens to its events.
    ///
    /// # Errors
    ///
    /// If there is no server with the device, or the host lacks something.
    pub(super) fn start(options: &WatchOptions) -> Result<Self, WatchError> {
        let interval = options.interval;
        let memory = match &options.device {
            Some(id) => format!("/hotplug/memory/{id}"),
            None => "/hotplug/memory".to_owned(),
        };
        request(&options.socket, Method::GET, &memory, None, PATIENCE)?;

        let (sender, updates) = mpsc::channel();
        let (sizes, wanted) = unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let source = Source {
            socket: options.socket.clone(),
            device: options.device.clone(),
            memory,
            sender,
        };
        let ask = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = source.look(interval) => {}
                    () = source.listen() => {}
                    () = source.resize(wanted) => {}
                }
            });
        };
        Ok(Self {
            updates,
            sizes: Some(sizes),
            thread: Some(thread::Builder::new().name("vmem-feed".into()).spawn(ask)?),
        })
    }

    /// Asks for another size of the guest.
    pub(super) fn resize(&self, size: u64) {
        // An error is that the thread has ended, which `updates` says too.
        let _ = self.sizes.as_ref().map(|sizes| sizes.send(size));
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.sizes = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that asks the server panicked");
        }
    }
}

struct Source {
    socket: PathBuf,
    device: Option<String>,
    /// Its path.
    memory: String,
    sender: mpsc::Sender<Update>,
}

impl Source {
    fn tell(&self, update: Update) {
        // An error is that nobody looks any more; the thread is about to end.
        let _ = self.sender.send(update);
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = timeout(PATIENCE, call(&self.socket, Method::GET, path, None)).await;
        let answer = answer.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        serde_json::from_value(answer).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Without end.
    async fn look(&self, interval: Duration) {
        loop {
            let memory = self.get(&self.memory).await;
            // Before it is started, a guest has no blocks.
            let blocks = match self.get(&format!("{}/blocks", self.memory)).await {
                Ok(blocks) => Ok(Some(blocks)),
                Err(ClientError::Refused { .. }) => Ok(None),
                Err(error) => Err(error),
            };
            let wait = match memory.and_then(|memory| Ok((memory, blocks?))) {
                Ok((memory, blocks)) => {
                    self.tell(Update::Memory(Box::new(memory)));
                    self.tell(Update::Blocks(blocks));
                    interval
                }
                Err(error) => {
                    self.tell(Update::Lost(reason(error)));
                    interval.max(RETRY)
                }
            };
            sleep(wait).await;
        }
    }

    /// Without end. That there is no server is for [`look`](Self::look) to say.
    async fn listen(&self) {
        let mut last = None;
        loop {
            let heard = events(&self.socket, last, |id, event| {
                last = id.or(last);
                self.tell(Update::Event(event));
            });
            match heard.await {
                // Another server may come, all of whose events are new.
                Err(ClientError::Connect(..)) => last = Some(0),
                Err(ClientError::Refused { message, .. }) => {
                    let message = format!("no events: {message}");
                    self.tell(Update::Message(message));
                }
                Ok(()) | Err(_) => {}
            }
            sleep(RETRY).await;
        }
    }

    /// Until nobody asks any more.
    async fn resize(&self, mut sizes: UnboundedReceiver<u64>) {
        while let Some(size) = sizes.recv().await {
            let mut body = json!({ "requested_size": size });
            if let Some(id) = &self.device {
                body["device"] = json!(id);
            }
            let asked = call(&self.socket, Method::POST, "/operations", Some(&body));
            let message = match timeout(PATIENCE, asked).await {
                // It comes as an event as well.
                Ok(Ok(_)) => continue,
                Ok(Err(error)) => reason(error),
                Err(_) => "the server does not answer".to_owned(),
            };
            self.tell(Update::Message(message));
        }
    }
}

fn reason(error: ClientError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
