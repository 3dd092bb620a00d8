//! Read-only connections for all who look at what the store keeps. A look never waits for the store's thread, which has
//! steps to write, and never makes it wait.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Semaphore;
use tonic::Status;

use crate::data::blocking;
use crate::driver::Cluster;
use crate::status::{failed, store_status};
use crate::store::{Store, StoreError};

/// Looks at the same time; more wait.
const READERS: usize = 8;

/// Connections, opened as they are needed and kept for the next look.
pub struct Readers {
    database: PathBuf,
    idle: Mutex<Vec<Store>>,
    places: Semaphore,
}

impl Readers {
    /// Readers of a database.
    pub fn new(database: PathBuf) -> Self {
        Self {
            database,
            idle: Mutex::default(),
            places: Semaphore::new(READERS),
        }
    }

    fn read<T>(&self, look: impl FnOnce(&Store) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let idle = self.idle().pop();
        let store = match idle {
            Some(store) => store,
            None => Store::open_read_only(&self.database)?,
        };
        let found = look(&store)?;
        self.idle().push(store);
        Ok(found)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Store>> {
        // A list of connections is whole at any time.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    /// Looks at what is on disk, on a blocking thread. What was just queued for writing may not be there yet.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let place = self.readers().places.acquire().await.map_err(failed)?;
        let cluster = self.clone();
        let found = blocking(move || cluster.readers().read(look).map_err(store_status)).await;
        drop(place);
        found
    }

    /// [`Cluster::read`] after all that was queued for writing before is on disk.
    pub async fn read_settled<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let settled = self.store().call(|_| Ok(())).await;
        settled.map_err(store_status)?;
        self.read(look).await
    }
}
