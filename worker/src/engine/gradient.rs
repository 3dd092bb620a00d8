//! Memory for one gradient: of this process alone, or where somebody else will read it.

use std::ops::{Deref, DerefMut};

use cohort_common::segment::Slot;

/// A gradient in the layout's order. An empty one has memory of its own as soon as it is filled.
#[derive(Debug)]
pub struct Gradient(Memory);

#[derive(Debug)]
enum Memory {
    Own(Vec<f32>),
    Slot(Slot),
}

impl Gradient {
    /// The slot that it lies in, if it does.
    pub fn slot(&self) -> Option<&Slot> {
        match &self.0 {
            Memory::Own(_) => None,
            Memory::Slot(slot) => Some(slot),
        }
    }

    /// Whether nobody else reads it.
    pub fn can_be_used_again(&self) -> bool {
        !self.slot().is_some_and(Slot::is_lent)
    }

    /// Makes it as long as a gradient is. What it holds then is what it was, or zeros.
    ///
    /// # Panics
    /// If it lies in a slot of another length.
    pub(super) fn fit(&mut self, len: usize) {
        match &mut self.0 {
            Memory::Own(values) => values.resize(len, 0.0),
            Memory::Slot(slot) => assert_eq!(slot.len(), len, "a slot for another gradient"),
        }
    }
}

impl Default for Gradient {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<f32>> for Gradient {
    fn from(values: Vec<f32>) -> Self {
        Self(Memory::Own(values))
    }
}

impl From<Slot> for Gradient {
    fn from(slot: Slot) -> Self {
        Self(Memory::Slot(slot))
    }
}

impl Deref for Gradient {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Memory::Own(values) => values,
            Memory::Slot(slot) => slot,
        }
    }
}

impl DerefMut for Gradient {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Memory::Own(values) => values,
            Memory::Slot(slot) => slot,
        }
    }
}
