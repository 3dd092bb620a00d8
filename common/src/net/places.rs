//! The coordinators of a cluster, of which one leads and the others stand by, and how the one that leads is found.

use std::fmt;
use std::time::Duration;

use cohort_proto::v1;
use cohort_proto::v1::client_client::ClientClient;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{ConnectError, Credentials, connect};
use crate::security::Whom;

/// Metadata key of an answer of a coordinator that stands by: where the one that leads is reached; empty if none does.
pub const LEADER_KEY: &str = "cohort-leader";

/// How long a coordinator may take to say whether it leads.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long the others are waited for once one has said that it stands by.
const OTHERS: Duration = Duration::from_secs(1);

/// Where coordinators of one cluster listen, at least one, in the order in which they were named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places(Vec<String>);

impl Places {
    /// These, if there are any.
    pub fn new(urls: impl IntoIterator<Item = String>) -> Option<Self> {
        let urls: Vec<String> = urls.into_iter().collect();
        (!urls.is_empty()).then_some(Self(urls))
    }

    /// All of them.
    pub fn urls(&self) -> &[String] {
        &self.0
    }

    /// The first.
    pub fn first(&self) -> &str {
        &self.0[0]
    }

    /// Whether there is only one, so that nobody need look who leads.
    pub fn is_single(&self) -> bool {
        self.0.len() == 1
    }

    /// Whether all of them are encrypted; an error names one that is not, where another is.
    pub fn are_private(&self) -> Result<bool, ConnectError> {
        let private = |url: &&String| url.starts_with("https://");
        match self.0.iter().filter(private).count() {
            0 => Ok(false),
            all if all == self.0.len() => Ok(true),
            _ => {
                let open = self.0.iter().find(|url| !private(url));
                Err(ConnectError::Unencrypted(open.expect("counted").clone()))
            }
        }
    }

    /// Finds the coordinator that leads: all are asked at once, and the first that leads is it. One that stands by may name
    /// another, which is asked then.
    ///
    /// # Errors
    /// If none leads, or none answers.
    pub async fn leader(&self, credentials: &Credentials) -> Result<Found, ConnectError> {
        let mut looks = JoinSet::new();
        let look_at = |looks: &mut JoinSet<_>, url: String| {
            let credentials = credentials.clone();
            let only = self.is_single();
            looks.spawn(async move {
                let found = match look(&url, &credentials).await {
                    // Nobody else can be asked: the call that is meant may take its time.
                    Ok(Look::Silent(channel)) if only => Ok(Look::Leads(channel)),
                    found => found,
                };
                (url, found)
            });
        };
        for url in &self.0 {
            look_at(&mut looks, url.clone());
        }
        let mut asked = self.0.clone();
        let (mut standing_by, mut first_error) = (Vec::new(), None);
        loop {
            // Where one stands by, another may lead; a machine that is gone may not answer at all.
            let next = match standing_by.is_empty() {
                true => Ok(looks.join_next().await),
                false => timeout(OTHERS, looks.join_next()).await,
            };
            let Ok(Some(looked)) = next else { break };
            let Ok((url, found)) = looked else { continue };
            match found {
                Ok(Look::Leads(channel)) => {
                    return Ok(Found {
                        url,
                        channel,
                        standing_by,
                    });
                }
                Ok(Look::StandsBy(by)) => {
                    if let Some(leader) = by.leader.filter(|leader| !asked.contains(leader)) {
                        asked.push(leader.clone());
                        look_at(&mut looks, leader);
                    }
                    standing_by.push((url, by.says));
                }
                Ok(Look::Silent(_)) => first_error = first_error.or(Some(silent(&url))),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match (standing_by.is_empty(), first_error) {
            (true, Some(error)) => Err(error),
            _ => Err(ConnectError::NobodyLeads(standing_by)),
        }
    }

    /// What each of them says of itself, for people.
    pub async fn survey(&self, credentials: &Credentials) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for url in &self.0 {
            let says = match look(url, credentials).await {
                Ok(Look::Leads(_)) => "leads".to_owned(),
                Ok(Look::StandsBy(by)) => by.says,
                Ok(Look::Silent(_)) => silent(url).to_string(),
                Err(error) => error.to_string(),
            };
            found.push((url.clone(), says));
        }
        found
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// The coordinator that leads.
pub struct Found {
    /// Where it is reached.
    pub url: String,
    /// A connection to it.
    pub channel: Channel,
    /// Others that answered before, and what they say of themselves.
    pub standing_by: Vec<(String, String)>,
}

/// What a coordinator says that stands by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandsBy {
    /// Where the one is reached that leads, if one does.
    pub leader: Option<String>,
    /// What it says, for people.
    pub says: String,
}

/// What a look at a coordinator finds.
enum Look {
    Leads(Channel),
    StandsBy(StandsBy),
    /// There was no answer, or not in time.
    Silent(Channel),
}

/// Whether this is the answer of a coordinator that stands by.
pub fn standing_by(status: &Status) -> Option<StandsBy> {
    let leader = status.metadata().get(LEADER_KEY)?.to_str().ok()?;
    Some(StandsBy {
        leader: (!leader.is_empty()).then(|| leader.to_owned()),
        says: status.message().to_owned(),
    })
}

async fn look(url: &str, credentials: &Credentials) -> Result<Look, ConnectError> {
    let channel = connect(url, credentials.trust.as_ref(), Whom::Coordinator).await?;
    let mut client = ClientClient::with_interceptor(channel.clone(), credentials.clone());
    match timeout(PATIENCE, client.whoami(v1::Empty {})).await {
        Ok(Err(status)) => match standing_by(&status) {
            Some(by) => Ok(Look::StandsBy(by)),
            None if lost(&status) => Ok(Look::Silent(channel)),
            // Whatever is wrong, the call that is meant will say.
            None => Ok(Look::Leads(channel)),
        },
        Ok(Ok(_)) => Ok(Look::Leads(channel)),
        Err(_) => Ok(Look::Silent(channel)),
    }
}

fn silent(url: &str) -> ConnectError {
    ConnectError::Unreachable {
        url: url.into(),
        reason: "it does not say whether it leads".into(),
    }
}

fn lost(status: &Status) -> bool {
    status.code() == Code::Unavailable && std::error::Error::source(status).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_of_a_coordinator_that_stands_by_names_a_leader() {
        let mut status = Status::unavailable("this coordinator stands by");
        assert_eq!(standing_by(&status), None);
        status
            .metadata_mut()
            .insert(LEADER_KEY, "http://a:1".parse().unwrap());
        let by = standing_by(&status).unwrap();
        assert_eq!(by.leader.as_deref(), Some("http://a:1"));
        status
            .metadata_mut()
            .insert(LEADER_KEY, "".parse().unwrap());
        assert_eq!(standing_by(&status).unwrap().leader, None);
    }

    #[test]
    fn one_place_of_several_that_is_not_encrypted_is_an_error() {
        let places = |urls: &[&str]| Places::new(urls.iter().map(|url| (*url).to_owned())).unwrap();
        assert!(places(&["https://a", "https://b"]).are_private().unwrap());
        assert!(!places(&["http://a", "http://b"]).are_private().unwrap());
        let mixed = places(&["https://a", "http://b"]).are_private();
        assert!(mixed.unwrap_err().to_string().contains("http://b"));
        assert_eq!(Places::new([]), None);
    }
}
