//! What follows from a worker's failures: it is gone, it rests, it is banned.

use super::Now;
use super::member::{Member, Presence};
use super::messages::{Command, Failure};
use crate::transport::PeerName;

/// A worker does not answer; whether that is news.
pub(super) fn leave(peer: &PeerName, member: &mut Member, why: &str, now: Now, commands: &mut Vec<Command>) -> bool {
    if !member.is_here() {
        return false;
    }
    member.leave(now);
    if !member.assigned.is_empty() {
        commands.push(Command::Say(format!("{peer} is gone ({why}): its layers go to others until it is back")));
    }
    true
}

/// Tells a worker that it has no layers any more, if it has any.
pub(super) fn release(peer: &PeerName, member: &mut Member, commands: &mut Vec<Command>) {
    if !member.assigned.is_empty() {
        member.exchanges += 1;
        commands.push(Command::Release { peer: peer.clone() });
    }
}

/// A worker refused its layers: it goes on with those that it had, or rests.
pub(super) fn refused(peer: &PeerName, member: &mut Member, why: &str, now: Now, commands: &mut Vec<Command>) -> bool {
    member.answered();
    commands.push(Command::Say(format!("{peer} refused its layers: {why}")));
    match member.before.take() {
        Some((assigned, held)) if !assigned.is_empty() => {
            member.room = assigned.len() as u16;
            (member.assigned, member.held, member.loading_since) = (assigned, held, None);
            member.ask_at = Some(now);
        }
        _ => member.rest(now),
    }
    true
}

/// A product failed; whether it takes another plan.
pub(super) fn failed(
    peer: &PeerName,
    member: &mut Member,
    layer: u16,
    failure: Failure,
    why: &str,
    now: Now,
    commands: &mut Vec<Command>,
) -> bool {
    let ban = match failure {
        Failure::Busy => return false,
        Failure::Away | Failure::Unable | Failure::NotServing => {
            let lacks = failure == Failure::NotServing && member.held.remove(&layer);
            if lacks {
                member.loading_since = member.loading_since.or(Some(now));
            }
            // Whether it still answers is worth knowing. What fails until that is known has failed of the same cause.
            let known = member.is_busy() || member.ask_at.is_some();
            member.ask_at = member.ask_at.or(Some(now));
            if known || !member.is_here() || !member.failed() {
                return lacks;
            }
            commands.push(Command::Say(format!("{peer} failed several times in a row ({why}): it rests for a while")));
            release(peer, member, commands);
            member.rest(now);
            return true;
        }
        Failure::Garbled | Failure::BodyRefuted => member.strike(),
        Failure::MaskRefuted => true,
    };
    if !ban {
        commands.push(Command::Say(format!("{peer} gave a wrong answer ({why}): one more, and it is banned")));
        return false;
    }
    let why = why.to_owned();
    release(peer, member, commands);
    member.forget_layers();
    commands.push(Command::Ban { peer: peer.clone(), why: why.clone(), served: member.served.clone() });
    commands.push(Command::Say(format!("{peer} is banned: {why}")));
    member.presence = Presence::Banned(why);
    true
}
