//! From a message to what it asks for. Layouts of bodies are in the vhost-user specification,
//! "Payload"; the `vhost` crate has them as types that check themselves.

use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostUserConfig, VhostUserInflight, VhostUserLog,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};

use super::channel::MAX_DESCRIPTORS;
use super::error::Refusal;
use super::handler::{Handler, MEMORY_SLOTS};
use super::message::{Kind, Message, Reply, part, unchecked};
use super::vring::UserRings;
use crate::engine::ratelimited_log;
use crate::reason::reason;
use crate::virtio::memory::RegionInfo;

/// Bit of a vring's number: no descriptor comes along, the front-end polls.
const NO_DESCRIPTOR: u64 = 0x100;

/// In the reply to SET_DEVICE_STATE_FD: no descriptor comes along, and the transfer failed.
const STATE_NO_DESCRIPTOR: u64 = 0x100;
const STATE_FAILED: u64 = 1;

/// A request's own reply; without one, success is acknowledged to a front-end that asks for it.
type Outcome = Result<Option<Reply>, Refusal>;

/// Does what `message` asks for. Descriptors that were not used stay with it.
pub fn dispatch(handler: &mut Handler, message: &mut Message) -> Outcome {
    use FrontendReq as Request;
    let request = Request::try_from(message.request).map_err(|_| Refusal::Unknown)?;
    let takes_files = matches!(
        request,
        Request::SET_MEM_TABLE
            | Request::SET_VRING_CALL
            | Request::SET_VRING_KICK
            | Request::SET_VRING_ERR
            | Request::SET_LOG_BASE
            | Request::SET_LOG_FD
            | Request::SET_INFLIGHT_FD
            | Request::ADD_MEM_REG
            | Request::SET_DEVICE_STATE_FD
            | Request::SET_BACKEND_REQ_FD
            // Some front-ends send one, which is to be ignored.
            | Request::REM_MEM_REG
    );
    if !takes_files {
        message.expect_files(0)?;
    }
    match request {
        Request::GET_FEATURES
        | Request::SET_FEATURES
        | Request::GET_PROTOCOL_FEATURES
        | Request::SET_PROTOCOL_FEATURES
        | Request::SET_OWNER
        | Request::RESET_OWNER
        | Request::RESET_DEVICE
        | Request::GET_QUEUE_NUM
        | Request::GET_MAX_MEM_SLOTS => device(handler, request, message),
        Request::SET_MEM_TABLE | Request::ADD_MEM_REG | Request::REM_MEM_REG => {
            memory(handler, request, message)
        }
        Request::SET_VRING_NUM
        | Request::SET_VRING_ADDR
        | Request::SET_VRING_BASE
        | Request::GET_VRING_BASE
        | Request::SET_VRING_ENABLE => vring(handler, request, message),
        Request::SET_VRING_CALL | Request::SET_VRING_KICK | Request::SET_VRING_ERR => {
            eventfd(handler, request, message)
        }
        Request::GET_CONFIG | Request::SET_CONFIG => config(handler, request, message),
        Request::GET_INFLIGHT_FD | Request::SET_INFLIGHT_FD => inflight(handler, request, message),
        Request::SET_LOG_BASE => log_base(handler, message),
        // The event that the log changed; nothing here raises it.
        Request::SET_LOG_FD => Ok(None),
        Request::SET_BACKEND_REQ_FD => backend_channel(handler, message),
        Request::SET_DEVICE_STATE_FD | Request::CHECK_DEVICE_STATE => {
            device_state(handler, request, message)
        }
        _ => Err(Refusal::Unknown),
    }
}

fn device(handler: &mut Handler, request: FrontendReq, message: &Message) -> Outcome {
    use FrontendReq as Request;
    match request {
        Request::SET_FEATURES => {
            let features: VhostUserU64 = message.body()?;
            return handler.set_features(features.value).map(|()| None);
        }
        Request::SET_PROTOCOL_FEATURES => {
            let features: VhostUserU64 = message.body()?;
            return handler.set_protocol_features(features.value).map(|()| None);
        }
        _ => message.no_body()?,
    }
    let number = match request {
        Request::GET_FEATURES => handler.offered(),
        Request::GET_PROTOCOL_FEATURES => handler.protocol_features(),
        Request::GET_QUEUE_NUM => handler.queue_num() as u64,
        Request::GET_MAX_MEM_SLOTS => MEMORY_SLOTS as u64,
        Request::RESET_OWNER | Request::RESET_DEVICE => {
            handler.reset_device();
            return Ok(None);
        }
        // SET_OWNER: a connection has one owner.
        _ => return Ok(None),
    };
    Ok(Some(Reply::number(number)))
}

fn region(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn memory(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> Outcome {
    if request == FrontendReq::SET_MEM_TABLE {
        let regions = memory_table(message)?;
        message.expect_files(regions.len())?;
        for file in &message.files {
            Kind::Memory.check(file)?;
        }
        let files = message.files.drain(..);
        let regions = regions.into_iter().zip(files).collect();
        return handler.set_memory(regions).map(|()| None);
    }
    let single: VhostUserSingleMemoryRegion = message.body()?;
    let info = region(&single);
    match request {
        FrontendReq::ADD_MEM_REG => handler.add_memory(info, message.file(Kind::Memory)?)?,
        _ => handler.remove_memory(info)?,
    }
    Ok(None)
}

/// The regions of SET_MEM_TABLE.
fn memory_table(message: &Message) -> Result<Vec<RegionInfo>, Refusal> {
    let (head, rest) = message.head_and_rest::<VhostUserMemory>()?;
    let count = head.num_regions as usize;
    if count > MAX_DESCRIPTORS || rest.len() != count * size_of::<VhostUserMemoryRegion>() {
        return Err(message.bad_body());
    }
    let regions = rest.chunks_exact(size_of::<VhostUserMemoryRegion>());
    let regions = regions.map(|bytes| part(bytes).map(|one| region(&one)));
    let regions: Option<Vec<_>> = regions.collect();
    regions.ok_or_else(|| message.bad_body())
}

fn vring(handler: &mut Handler, request: FrontendReq, message: &Message) -> Outcome {
    use FrontendReq as Request;
    if request == Request::SET_VRING_ADDR {
        let address: VhostUserVringAddr = message.body()?;
        let logged = address.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        let rings = UserRings {
            descriptors: address.descriptor,
            available: address.available,
            used: address.used,
            used_log: logged.then_some(address.log),
        };
        return handler.set_vring_rings(address.index, rings).map(|()| None);
    }
    let VhostUserVringState { index, num } = message.body()?;
    match request {
        Request::SET_VRING_NUM => handler.set_vring_size(index, num)?,
        Request::SET_VRING_BASE => handler.set_vring_base(index, num)?,
        Request::SET_VRING_ENABLE if num > 1 => return Err(message.bad_body()),
        Request::SET_VRING_ENABLE => {
            handler.change_vring(index, |vring| vring.enabled = num == 1)?;
        }
        // GET_VRING_BASE
        _ => {
            let base = handler.stop_vring(index)?;
            let words = [index, u32::from(base)].map(u32::to_le_bytes);
            return Ok(Some(Reply::bytes(words.as_flattened().to_vec())));
        }
    }
    Ok(None)
}

fn eventfd(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> Outcome {
    let VhostUserU64 { value } = message.body()?;
    let file = match value & NO_DESCRIPTOR {
        0 => Some(message.file(Kind::Eventfd)?.into()),
        _ => {
            message.expect_files(0)?;
            None
        }
    };
    let index = (value & 0xff) as u32;
    handler.change_eventfds(index, |vring| match request {
        FrontendReq::SET_VRING_CALL => vring.eventfds.call = file,
        FrontendReq::SET_VRING_ERR => vring.eventfds.error = file,
        _ => (vring.eventfds.kick, vring.started) = (file, true),
    })?;
    Ok(None)
}

fn config(handler: &mut Handler, request: FrontendReq, message: &Message) -> Outcome {
    if request == FrontendReq::GET_CONFIG {
        return read_config(handler, message);
    }
    let (head, bytes) = message.head_and_rest::<VhostUserConfig>()?;
    if bytes.len() != head.size as usize {
        return Err(message.bad_body());
    }
    handler.set_config(head.offset, bytes).map(|()| None)
}

/// Answers GET_CONFIG. A range that the configuration space does not have is answered by no bytes of
/// it.
fn read_config(handler: &mut Handler, message: &Message) -> Outcome {
    let parts = message.body.split_at_checked(size_of::<VhostUserConfig>());
    let (head, rest) = parts.ok_or_else(|| message.bad_body())?;
    let head: VhostUserConfig = unchecked(head).ok_or_else(|| message.bad_body())?;
    let (offset, size, flags) = (head.offset, head.size, head.flags);
    let bytes = match rest.len() == size as usize {
        true => handler.config(offset, size).unwrap_or_default(),
        false => Vec::new(),
    };
    let words = [offset, bytes.len() as u32, flags].map(u32::to_le_bytes);
    Ok(Some(Reply::bytes([words.as_flattened(), &bytes].concat())))
}

fn inflight(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> Outcome {
    if request == FrontendReq::SET_INFLIGHT_FD {
        let given = message.body()?;
        let file = message.file(Kind::Memory)?;
        return handler.set_inflight(&given, &file).map(|()| None);
    }
    let asked = unchecked(&message.body).ok_or_else(|| message.bad_body())?;
    // An area of no bytes, without a descriptor, is a failure: the front-end can go on without one.
    let (given, file) = match handler.make_inflight(&asked) {
        Ok((given, file)) => (given, Some(file)),
        Err(refusal) => {
            ratelimited_log::warn(format_args!(
                "cannot make an in-flight area: {}",
                reason(&refusal)
            ));
            let none = VhostUserInflight {
                mmap_size: 0,
                ..asked
            };
            (none, None)
        }
    };
    let places = [given.mmap_size, given.mmap_offset].map(u64::to_le_bytes);
    let sizes = [given.num_queues, given.queue_size, 0, 0].map(u16::to_le_bytes);
    let body = [places.as_flattened(), sizes.as_flattened()].concat();
    Ok(Some(Reply { body, file }))
}

fn log_base(handler: &mut Handler, message: &mut Message) -> Outcome {
    let log: VhostUserLog = message.body()?;
    let file = message.file(Kind::Memory)?;
    handler.set_log(&log, &file)?;
    Ok(Some(Reply::bytes(message.body.clone())))
}

fn backend_channel(handler: &mut Handler, message: &mut Message) -> Outcome {
    message.no_body()?;
    let channel = message.file(Kind::UnixStream)?;
    // Closed with the message, where that may take long.
    message.files.extend(handler.set_backend_channel(channel));
    Ok(None)
}

fn device_state(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> Outcome {
    if request == FrontendReq::CHECK_DEVICE_STATE {
        message.no_body()?;
        let checked = handler.check_state();
        let failed = u64::from(checked.is_err());
        // Closed with the message, where that may take long.
        message.files.extend(checked.ok().flatten());
        return Ok(Some(Reply::number(failed)));
    }
    let state: VhostUserTransferDeviceState = message.body()?;
    let answer = match message.file(Kind::Stream) {
        Ok(stream) if state.direction == VhostTransferStateDirection::LOAD as u32 => {
            message.files.extend(handler.load_state(stream));
            STATE_NO_DESCRIPTOR
        }
        Ok(stream) => {
            // Closed with the message.
            message.files.push(stream);
            STATE_NO_DESCRIPTOR
        }
        Err(Refusal::Kind { .. }) => STATE_NO_DESCRIPTOR | STATE_FAILED,
        Err(refusal) => return Err(refusal),
    };
    Ok(Some(Reply::number(answer)))
}
