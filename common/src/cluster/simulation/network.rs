//! The network of the simulation: each direction of a connection keeps its order, unless it is harmed.

use super::world::{Down, Next, Up, World};
use crate::ids::SessionId;

impl World {
    pub(super) fn latency(&mut self) -> u64 {
        match self.draw(50) {
            0 => 20 + self.draw(200),
            _ => self.draw(4),
        }
    }

    pub(super) fn send_up(&mut self, w: usize, up: Up) {
        let Some(session) = self.workers[w].session else {
            return;
        };
        let arrival = self.now + self.latency();
        let connection = &mut self.workers[w].connection;
        let direction = match &up {
            Up::Control(_) => &mut connection.control_up,
            Up::Push(..) | Up::Alive => &mut connection.push_up,
        };
        let number = direction.out.number();
        direction.last = direction.last.max(arrival);
        let arrival = direction.last;
        self.deliver(arrival, Next::Up(w, session, number, up));
    }

    pub(super) fn send_down(&mut self, w: usize, session: SessionId, down: Down) {
        let arrival = self.now + self.latency();
        if self.workers[w].session != Some(session) {
            return;
        }
        let connection = &mut self.workers[w].connection;
        let direction = match &down {
            Down::Control(_) => &mut connection.control_down,
            Down::Root(..) | Down::Alive => &mut connection.root_down,
        };
        let number = direction.out.number();
        direction.last = direction.last.max(arrival);
        let arrival = direction.last;
        self.deliver(arrival, Next::Down(w, session, number, down));
    }

    pub(super) fn deliver(&mut self, arrival: u64, next: Next) {
        if self.chance(self.harm.lost) {
            return;
        }
        if self.chance(self.harm.copied) {
            let later = arrival + self.draw(20);
            self.at(later, next.clone());
        }
        let arrival = match self.chance(self.harm.swapped) {
            true => arrival + 30,
            false => arrival,
        };
        self.at(arrival, next);
    }
}
