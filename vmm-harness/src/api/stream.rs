//! Server-sent events as the body of an answer.

use std::convert::Infallible;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;

use super::peer::Peer;
use crate::control::Listener;

/// How often a stream without events says that it is still there.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Ends with the server, with its client, or when there will be no more events. What it has is given back with it.
pub(super) struct EventStream(Pin<Box<Next>>);

/// The next piece of text, and where what is after it comes from.
type Next = dyn Future<Output = Option<(String, Source)>> + Send;

/// Where the text comes from.
pub(super) struct Source {
    pub(super) events: Listener,
    pub(super) peer: Arc<Peer>,
    pub(super) stopped: watch::Receiver<bool>,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl EventStream {
    pub(super) fn new(source: Source) -> Self {
        // At once, so that a client knows from when on it misses nothing.
        let connected = String::from(": connected\n\n");
        Self(Box::pin(async { Some((connected, source)) }))
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = ready!(self.0.as_mut().poll(context));
        Poll::Ready(match next {
            Some((text, source)) => {
                self.0 = Box::pin(source.next());
                Some(Ok(Frame::data(Bytes::from(text))))
            }
            None => {
                self.0 = Box::pin(pending());
                None
            }
        })
    }
}

impl Source {
    async fn next(mut self) -> Option<(String, Self)> {
        let event = tokio::select! {
            // What has happened is told before the end.
            biased;
            () = self.peer.gone() => return None,
            event = timeout(HEARTBEAT, self.events.next()) => event,
            _ = self.stopped.wait_for(|stopped| *stopped) => return None,
        };
        let text = match event {
            Ok(Some((lost, id, event))) => {
                // Without a number of its own: who comes back asks for what is after the last event it has.
                let missed = match lost {
                    0 => String::new(),
                    lost => format!("data: {{\"event\":\"missed\",\"count\":{lost}}}\n\n"),
                };
                // Fields, strings and numbers: there is nothing that could fail.
                let data = serde_json::to_string(&event).unwrap_or_default();
                format!("{missed}id: {id}\ndata: {data}\n\n")
            }
            Ok(None) => return None,
            Err(_) => String::from(": nothing new\n\n"),
        };
        Some((text, self))
    }
}
