//! How fast the way to a peer is: measured when it is opened, before anything is pushed.
//!
//! A few empty probes tell the time there and back. Then probes with padding follow each other, with more and more of them on
//! the way, as TCP takes some rounds until it uses a line. Only the later half of their echoes counts, and of that the time between
//! the first and the last, so that neither the way itself nor the beginning does.

use std::time::{Duration, Instant};

use bytes::Bytes;
use cohort_common::cluster::links::Link;
use cohort_common::exchange::{Incoming, MEASURING};
use cohort_common::seal::{Opener, Sealer};
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

/// Empty probes.
const PINGS: usize = 3;

/// Bytes of padding.
const PADDING: usize = 64 * 1024;

/// Probes on the way: at first, and at most.
const WINDOW: (usize, usize) = (2, 32);

/// Probes in all, at most: 4 MiB.
const MOST: usize = 64;

/// How long probes are sent.
const TIME: Duration = Duration::from_millis(500);

/// A way to a peer that nothing was pushed on yet.
pub(super) struct Way<'a> {
    pub(super) sealer: &'a mut Sealer,
    pub(super) out: &'a mpsc::Sender<v1::Chunk>,
    pub(super) opener: &'a mut Opener,
    pub(super) incoming: &'a mut Incoming,
}

impl Way<'_> {
    /// Measures it once `turn` comes, as two at a time would each find half of a line's speed; the peer sees to the same at its
    /// end. `None` where that takes too long: echoes may still come then.
    ///
    /// # Errors
    /// If the peer is gone.
    pub(super) async fn measure(self, turn: &Mutex<()>) -> Result<Option<Link>, String> {
        let measure = async {
            let _turn = turn.lock().await;
            self.measure_now().await
        };
        timeout(MEASURING, measure).await.ok().transpose()
    }

    async fn measure_now(mut self) -> Result<Link, String> {
        let mut nearest = Duration::MAX;
        for number in 0..PINGS {
            let sent = Instant::now();
            self.probe(number, Bytes::new()).await?;
            self.echo(number).await?;
            nearest = nearest.min(sent.elapsed());
        }
        let bytes_per_second = self.burst(nearest).await?;
        Ok(Link {
            rtt_micros: nearest.as_micros() as u64,
            bytes_per_second,
        })
    }

    async fn burst(&mut self, nearest: Duration) -> Result<u64, String> {
        let padding = Bytes::from(vec![0; PADDING]);
        let began = Instant::now();
        let mut echoes: Vec<Duration> = Vec::new();
        let (mut sent, mut window) = (0, WINDOW.0);
        loop {
            let sending = sent < MOST && began.elapsed() < TIME;
            if sending && sent - echoes.len() < window {
                self.probe(PINGS + sent, padding.clone()).await?;
                sent += 1;
            } else if echoes.len() < sent {
                self.echo(PINGS + echoes.len()).await?;
                echoes.push(began.elapsed());
                window = (window + 1).min(WINDOW.1);
            } else {
                return Ok(speed(&echoes, nearest));
            }
        }
    }

    async fn probe(&mut self, number: usize, padding: Bytes) -> Result<(), String> {
        let number = number as u32;
        let gone = |_| "it takes nothing any more".to_owned();
        // A measurement may end while it waits here, and must not leave a gap in the numbers.
        let place = self.out.reserve().await.map_err(gone)?;
        let probe = Kind::Probe(v1::Probe { number, padding });
        place.send(self.sealer.chunk(probe));
        Ok(())
    }

    /// The next thing that comes is an echo of this number.
    async fn echo(&mut self, number: usize) -> Result<(), String> {
        let chunk = match self.incoming.next().await {
            None => return Err("it closed the link".into()),
            Some(Err(status)) => return Err(status.message().to_owned()),
            Some(Ok(chunk)) => chunk,
        };
        match self.opener.chunk(chunk) {
            Ok(Some(Kind::Echo(echo))) if echo.number as usize == number => Ok(()),
            Ok(_) => Err(format!(
                "it did not answer probe {number} with an echo of it"
            )),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Bytes a second, by when each echo came.
fn speed(echoes: &[Duration], nearest: Duration) -> u64 {
    let Some((&last, before)) = echoes.split_last() else {
        return 0;
    };
    let skipped = echoes.len() / 2;
    let (count, time) = match before.get(skipped.saturating_sub(1)) {
        Some(&first) if skipped > 0 => (echoes.len() - skipped, last - first),
        _ => (echoes.len(), last.saturating_sub(nearest)),
    };
    let time = time.as_secs_f64().max(1e-6);
    ((count * PADDING) as f64 / time) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_later_half_counts() {
        let ms = |times: &[u64]| -> Vec<Duration> {
            times.iter().map(|t| Duration::from_millis(*t)).collect()
        };
        // Two probes took 10 ms, after a slow start.
        let rate = speed(&ms(&[50, 100, 105, 110]), Duration::from_millis(40));
        assert_eq!(rate, 2 * 65_536 * 100);
        // A single one has the way itself in it.
        let rate = speed(&ms(&[140]), Duration::from_millis(40));
        assert_eq!(rate, 65_536 * 10);
        assert_eq!(speed(&[], Duration::ZERO), 0);
    }
}
