//! A pool of buffers, so that a step in the steady state asks the allocator for little.

use std::sync::Mutex;

/// Buffers that wait for their next use.
#[derive(Default)]
pub struct Buffers(Mutex<Vec<Vec<f32>>>);

impl Buffers {
    /// A buffer of exactly `len` elements, with whatever they were.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.lock();
        let fits = |buffer: &Vec<f32>| (len..=2 * len).contains(&buffer.capacity());
        let best = (0..free.len())
            .filter(|&i| fits(&free[i]))
            .min_by_key(|&i| free[i].capacity());
        match best {
            Some(index) => {
                let mut buffer = free.swap_remove(index);
                drop(free);
                buffer.resize(len, 0.0);
                buffer
            }
            None => vec![0.0; len],
        }
    }

    /// Takes a buffer back.
    pub fn give(&self, buffer: Vec<f32>) {
        if buffer.capacity() == 0 {
            return;
        }
        let mut free = self.lock();
        // More than any model's block keeps alive per layer means that batch shapes change: start afresh.
        if free.len() >= 4096 {
            free.clear();
        }
        free.push(buffer);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<f32>>> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_its_own_size() {
        let buffers = Buffers::default();
        let buffer = buffers.take(100);
        let address = buffer.as_ptr();
        buffers.give(buffer);
        assert_eq!(buffers.take(10).len(), 10);
        let again = buffers.take(90);
        assert_eq!((again.as_ptr(), again.len()), (address, 90));
    }
}
