//! Shards from the coordinator's object store, by URLs that it signs: its own link is not used, and no worker needs
//! credentials. What cannot be had there is asked of the coordinator, and the store is left alone for a while.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cohort_objects::web::Web;
use cohort_objects::{Download, ObjectError, Reach, Source, WebFile};
use cohort_proto::v1;
use tokio::time::timeout;

use crate::data::Inner;

/// How long a shard may take, beside the time for its bytes.
const PATIENCE: Duration = Duration::from_secs(10);
/// The least speed that is waited for, in bytes a second.
const SLOWEST: u64 = 1 << 20;
/// How long the store is left alone when it did not give a shard.
const REST: Duration = Duration::from_secs(60);

/// Where shards can be besides at the coordinator.
#[derive(Debug)]
pub struct Elsewhere {
    web: Web,
    /// Nobody is asked before.
    rests_until: Mutex<Option<Instant>>,
}

impl Default for Elsewhere {
    fn default() -> Self {
        Self {
            // The coordinator says where.
            web: Web::new(Reach::Everywhere, true),
            rests_until: Mutex::default(),
        }
    }
}

impl Elsewhere {
    /// Fetches a shard, if it can be had. What it says is not looked at.
    pub async fn fetch(
        &self,
        client: &mut Inner,
        shard: &v1::ShardRequest,
        part: &Path,
        bytes: u64,
    ) -> bool {
        let rests_until = *self.rests_until.lock().expect("no panic under this lock");
        if rests_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        // One of an earlier version does not know the question, and that is no reason to ask it every time.
        let place = client.shard_place(shard.clone()).await;
        let url = place
            .map(|place| place.into_inner().url)
            .unwrap_or_default();
        let Some(file) = WebFile::signed(self.web.clone(), &url) else {
            self.rest();
            return false;
        };
        let enough = PATIENCE + Duration::from_secs(bytes / SLOWEST);
        match timeout(enough, receive(file, part, bytes)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                tracing::warn!(%error, "a shard cannot be read from the store; the coordinator is asked for it");
            }
            Err(_) => tracing::warn!("the store is slow; the coordinator is asked for the shard"),
        }
        self.rest();
        false
    }

    fn rest(&self) {
        let until = Instant::now() + REST;
        *self.rests_until.lock().expect("no panic under this lock") = Some(until);
    }
}

async fn receive(file: WebFile, part: &Path, bytes: u64) -> Result<(), ObjectError> {
    let download = Download::find(Source::Web(Box::new(file))).await?;
    if download.bytes() != Some(bytes) {
        // It is another file, however long it may be.
        let url = download.url().to_owned();
        return Err(ObjectError::Changed { url });
    }
    download.to_file(part, &|_| {}).await.map(|_| ())
}
