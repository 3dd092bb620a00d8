//! What the dashboard knows and what is chosen to be seen of it. **Pure:** news go in here, keys in `keys.rs`; what is
//! drawn depends on nothing else.

use cohort_common::api::{ClusterView, History, RunInfo, RunView, StepEvent, TimelineEntry};

/// A notice goes away after so many looks at the cluster, which are a second apart.
const NOTICE_LOOKS: u32 = 10;
/// Points of a chart that are asked for before anybody knows how wide it is.
const POINTS: usize = 160;

/// Something that the feed has found out.
#[derive(Clone, Debug)]
pub enum News {
    /// Where what is shown comes from.
    Link(Link),
    /// The cluster.
    Cluster(Box<ClusterView>),
    /// All runs, oldest first.
    Runs(Vec<RunInfo>),
    /// The run that is looked at.
    Run(Box<RunView>),
    /// The steps of the run that is looked at.
    History(Box<History>),
    /// A step of the run that is looked at was committed.
    Step(StepEvent),
    /// What came of something that a key has asked for, or what else a person should know.
    Told(String),
}

/// Where what is shown comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// A coordinator that answers.
    Live,
    /// A coordinator that does not answer any more: why.
    Lost(String),
    /// A home directory on which no coordinator runs.
    Home(String),
}

/// What the feed is to bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// The run; `None` for the active one, or else the newest.
    pub run: Option<String>,
    /// The steps are halved so often, from the front.
    pub zoom: u32,
    /// Points of the history.
    pub points: usize,
    /// Whether the list of runs is open.
    pub runs: bool,
}

/// Something that is done to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A checkpoint, then rest.
    Pause,
    /// A checkpoint; the run goes on.
    Checkpoint,
    /// On with it.
    Resume,
    /// The end, for good.
    Cancel,
}

/// What the horizontal axis of the charts counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Axis {
    /// Steps.
    #[default]
    Step,
    /// Tokens.
    Tokens,
    /// Time since the first step that is shown.
    Time,
}

/// A panel that can be chosen, to scroll it, or to have all the room where there is little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Panel {
    /// The charts.
    #[default]
    Charts,
    /// The workers.
    Workers,
    /// What happened.
    Events,
    /// The checkpoints.
    Checkpoints,
}

impl Panel {
    /// All of them, in the order in which Tab goes through them.
    pub const ALL: [Self; 4] = [Self::Charts, Self::Workers, Self::Events, Self::Checkpoints];
}

/// What lies over the panels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Over {
    /// Nothing.
    #[default]
    Nothing,
    /// The keys.
    Help,
    /// The runs, with the place of the one that is marked.
    Runs(usize),
    /// What the prompts gave, from this one on.
    Samples(usize),
    /// Whether this is to be done.
    Question(Action),
}

/// All that the dashboard knows.
#[derive(Clone, Debug)]
pub struct State {
    /// Where it comes from.
    pub link: Link,
    /// The coordinator's clock at its last answer, in milliseconds since the epoch.
    pub now_ms: u64,
    /// The cluster; absent while it is not known.
    pub cluster: Option<ClusterView>,
    /// All runs, oldest first.
    pub runs: Vec<RunInfo>,
    /// The run that is looked at.
    pub run: Option<RunView>,
    /// Its steps.
    pub history: History,
    /// The newest step of it that is known.
    pub newest: Option<StepEvent>,
    /// What the feed is to bring.
    pub look: Look,
    /// What the charts' horizontal axis counts.
    pub axis: Axis,
    /// Whether the loss is drawn on a logarithmic scale.
    pub logarithmic: bool,
    /// The chosen panel.
    pub panel: Panel,
    /// Rows that are scrolled past in each panel of [`Panel::ALL`].
    pub scrolled: [usize; 4],
    /// What lies over the panels.
    pub over: Over,
    /// What a person should know now.
    pub notice: Option<String>,
    notice_looks: u32,
    changed: bool,
}

impl State {
    /// A dashboard that looks at a run, or else at the active one. `now_ms` is the moment of this machine's clock.
    pub fn new(run: Option<String>, link: Link, now_ms: u64) -> Self {
        Self {
            link,
            now_ms,
            cluster: None,
            runs: Vec::new(),
            run: None,
            history: History::default(),
            newest: None,
            look: Look {
                run,
                zoom: 0,
                points: POINTS,
                runs: false,
            },
            axis: Axis::default(),
            logarithmic: false,
            panel: Panel::default(),
            scrolled: [0; 4],
            over: Over::default(),
            notice: None,
            notice_looks: 0,
            changed: true,
        }
    }

    /// Whether anything that is drawn may have changed since the last time that this was asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Whether anything that is drawn may have changed.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// What was drawn is not what is on the screen any more.
    pub fn touch(&mut self) {
        self.changed = true;
    }

    /// The charts have so many columns of dots.
    pub fn widen(&mut self, dots: usize) {
        self.look.points = dots.clamp(16, 1024);
    }

    /// Takes news in.
    pub fn take(&mut self, news: News) {
        match news {
            News::Link(link) => self.linked(link),
            News::Cluster(cluster) => self.clustered(*cluster),
            News::Runs(runs) => set(&mut self.runs, runs, &mut self.changed),
            News::Run(run) => self.looked(*run),
            News::History(history) => {
                if self.shows(&history.run) {
                    set(&mut self.history, *history, &mut self.changed);
                }
            }
            News::Step(step) => {
                // Old steps are told again after a new connection.
                let newest = self.newest.as_ref().map_or(0, |newest| newest.step);
                if self.shows(&step.run) && step.step > newest {
                    self.newest = Some(step);
                    self.changed = true;
                }
            }
            News::Told(text) => self.tell(text),
        }
    }

    fn linked(&mut self, link: Link) {
        if self.link == link {
            return;
        }
        if link == Link::Live {
            self.tell("a coordinator answers now".into());
        }
        if link != Link::Live {
            // Nobody knows what they do.
            self.cluster = None;
        }
        self.link = link;
        self.changed = true;
    }

    fn clustered(&mut self, cluster: ClusterView) {
        self.notice_looks += 1;
        if self.notice.is_some() && self.notice_looks > NOTICE_LOOKS {
            self.notice = None;
            self.changed = true;
        }
        let before = self.cluster.as_ref().and_then(|c| c.active.as_ref());
        let other = cluster.active.as_ref().filter(|active| {
            let news = self.cluster.is_some() && before != Some(*active);
            news && !self.shows(active)
        });
        if let Some(active) = other.cloned() {
            self.tell(format!("{active} trains now; r lists the runs"));
        }
        self.now_ms = cluster.now_ms;
        let scrolled = &mut self.scrolled[Panel::Workers as usize];
        *scrolled = (*scrolled).min(cluster.workers.len().saturating_sub(1));
        set(&mut self.cluster, Some(cluster), &mut self.changed);
    }

    fn looked(&mut self, run: RunView) {
        match &self.look.run {
            None => self.look.run = Some(run.info.name.clone()),
            Some(name) if *name != run.info.name => return,
            Some(_) => {}
        }
        // Steps may have been taken back, so this counts more than what was heard before.
        set(
            &mut self.newest,
            run.info.last_step.clone(),
            &mut self.changed,
        );
        set(&mut self.run, Some(run), &mut self.changed);
    }

    /// Looks at another run.
    pub fn turn_to(&mut self, run: String) {
        if self.shows(&run) {
            return;
        }
        self.look.run = Some(run);
        self.look.zoom = 0;
        self.run = None;
        self.newest = None;
        self.history = History::default();
        self.scrolled = [0; 4];
        self.changed = true;
    }

    /// Says something until the next key, or for some seconds.
    pub fn tell(&mut self, text: String) {
        self.notice = Some(text);
        self.notice_looks = 0;
        self.changed = true;
    }

    /// Whether a run is the one that is looked at.
    pub fn shows(&self, run: &str) -> bool {
        self.look.run.as_deref() == Some(run)
    }

    /// What happened, newest first.
    pub fn events(&self) -> impl Iterator<Item = &TimelineEntry> {
        self.run.iter().flat_map(|run| run.timeline.iter().rev())
    }

    /// Rows of a panel.
    pub fn rows(&self, panel: Panel) -> usize {
        let run = self.run.as_ref();
        match panel {
            Panel::Charts => 0,
            Panel::Workers => self.cluster.as_ref().map_or(0, |c| c.workers.len()),
            Panel::Events => run.map_or(0, |run| run.timeline.len()),
            Panel::Checkpoints => run.map_or(0, |run| run.info.checkpoints.len()),
        }
    }

    /// Rows that are scrolled past in a panel.
    pub fn scrolled(&self, panel: Panel) -> usize {
        self.scrolled[panel as usize]
    }
}

fn set<T: PartialEq>(old: &mut T, new: T, changed: &mut bool) {
    if *old != new {
        *old = new;
        *changed = true;
    }
}
