//! What the driver tells of its cluster: for clients, and for those who watch it.

use std::time::Instant;

use cohort_common::api::{
    ClusterInfo, ClusterView, ControlView, SystemView, WorkerInfo, WorkerView,
};
use cohort_common::cluster::coordinator::Member;
use cohort_common::ids::SessionId;

use super::{Driver, now_ms};

impl Driver {
    pub(super) fn view(&self) -> ClusterView {
        let described = self.describe();
        let members = self.machine.members().iter();
        let now = Instant::now();
        let active = self.machine.active_run().and_then(|run| self.runs.get(run));
        let flops_per_token = active.map(|record| record.facts.flops_per_token);
        let straggler = self.figures.straggler(now);
        let worker = |(worker, (session, member)): (WorkerInfo, (&SessionId, &Member))| {
            let mut view = WorkerView {
                name: worker.name,
                host: worker.host,
                pid: worker.pid,
                device: worker.device,
                threads: worker.threads,
                lanes: worker.lanes,
                joined_ms: self.joined_ms.get(session).copied().unwrap_or_default(),
                line_bytes_per_second: member.line.speed(),
                line_rtt_ms: member.line.rtt_micros.map(|micros| micros as f64 / 1000.0),
                ..WorkerView::default()
            };
            self.figures.show(*session, &mut view, flops_per_token, now);
            view.straggler = straggler
                .as_ref()
                .filter(|(late, _)| late == session)
                .map(|(_, why)| why.clone());
            view
        };
        ClusterView {
            version: described.version,
            home: described.home,
            now_ms: now_ms(),
            started_ms: self.started_ms,
            workers: described
                .workers
                .into_iter()
                .zip(members)
                .map(worker)
                .collect(),
            active: described.active,
            queued: described.queued,
            system: SystemView {
                control: self.control(),
                ..*self.system.borrow()
            },
        }
    }

    fn control(&self) -> ControlView {
        let traffic = self.cluster.traffic();
        let (messages_sent, bytes_sent) = traffic.sent.read();
        let (messages_received, bytes_received) = traffic.received.read();
        ControlView {
            messages_sent,
            bytes_sent,
            messages_received,
            bytes_received,
        }
    }

    pub(super) fn describe(&self) -> ClusterInfo {
        let worker = |(&session, member): (&SessionId, &Member)| WorkerInfo {
            name: session.to_string(),
            host: member.info.host.clone(),
            pid: member.info.pid,
            device: member.info.device.clone(),
            threads: member.info.threads,
            lanes: self.machine.lanes_of(session),
        };
        ClusterInfo {
            version: env!("CARGO_PKG_VERSION").into(),
            home: self.cluster.home().root().display().to_string(),
            workers: self.machine.members().iter().map(worker).collect(),
            active: self.machine.active_run().map(|r| r.to_string()),
            queued: self.machine.queued().map(ToString::to_string).collect(),
        }
    }
}
