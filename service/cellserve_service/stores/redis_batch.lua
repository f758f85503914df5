-- Does a batch of operations on the sessions that Redis keeps, and nothing of it beside anything else.
--
-- cellserve:session:ID    a hash: the row of a session, or, where it has `reason`, the memory of one that ended
-- cellserve:ids:          ids of all rows, score 0, so that they are in order; cellserve:ids:MODEL those of a model
-- cellserve:expiry:MODEL  ids of a model's rows by the time when they expire
-- cellserve:models        models that have, or had, rows
-- cellserve:batch:WRITER  the number of the writer's latest batch
--
-- The times in a hash decide what it is; the key lives a little longer. Where no server is left to delete it, it vanishes
-- by itself, and from the sorted sets when a batch finds it there.
--
-- ARGV: writer, number of the batch, replica, now, gone_before (rows that expired by then are forgotten), how many rows
-- to forget at most, then the operations: a letter, and the arguments that redis_script.py writes. 64-bit marks stay
-- text, for a Lua number has 53 bits.

local KEY = 'cellserve:'
local SLACK_SECONDS = 60
local FOREVER_MILLISECONDS = 1e15
local BATCH_SECONDS = 3600

local writer, number = ARGV[1], tonumber(ARGV[2])
local replica = ARGV[3]
local now, gone_before = tonumber(ARGV[4]), tonumber(ARGV[5])
local memory_seconds = now - gone_before
local max_forgotten = tonumber(ARGV[6])
local place = 6

local function take()
  place = place + 1
  return ARGV[place]
end

local function whole(number)
  return string.format('%.0f', number)
end

-- What decides about a session; nil where it never was, or is forgotten.
local function read(id)
  local found = redis.call('HMGET', KEY .. 'session:' .. id,
    'model', 'epoch', 'state_epoch', 'position', 'replica', 'holder', 'token', 'request_id', 'reason', 'until')
  if not found[1] then
    return nil
  end
  local ends, is_ended = tonumber(found[10]), found[9] ~= ''
  if ends <= (is_ended and now or gone_before) then
    return nil
  end
  return {
    model = found[1],
    epoch = tonumber(found[2]),
    state_epoch = tonumber(found[3]),
    position = tonumber(found[4]),
    replica = found[5],
    holder = found[6],
    token = found[7],
    request_id = found[8],
    reason = found[9],
    is_ended = is_ended,
    is_living = not is_ended and ends > now,
  }
end

local function unlist(id, model)
  redis.call('ZREM', KEY .. 'ids:', id)
  redis.call('ZREM', KEY .. 'ids:' .. model, id)
  redis.call('ZREM', KEY .. 'expiry:' .. model, id)
end

local function keep_until(key, seconds)
  local milliseconds = math.ceil((seconds - now + SLACK_SECONDS) * 1000)
  if milliseconds < FOREVER_MILLISECONDS then
    redis.call('PEXPIRE', key, whole(milliseconds))
  else
    redis.call('PERSIST', key)
  end
end

local function put(id, row, epoch, holder, token)
  local key = KEY .. 'session:' .. id
  local model = redis.call('HGET', key, 'model')
  if model and model ~= row.model then
    unlist(id, model)
  end
  redis.call('DEL', key)
  redis.call('HSET', key, 'model', row.model, 'epoch', whole(epoch), 'state_epoch', row.epoch,
    'position', row.position, 'replica', replica, 'holder', holder, 'token', token, 'request_id', row.request_id,
    'reason', '', 'until', row.expires_at, 'blob', row.blob, 'checkpoints', row.checkpoints)
  keep_until(key, tonumber(row.expires_at) + memory_seconds)
  redis.call('ZADD', KEY .. 'ids:', 0, id)
  redis.call('ZADD', KEY .. 'ids:' .. row.model, 0, id)
  redis.call('ZADD', KEY .. 'expiry:' .. row.model, row.expires_at, id)
  redis.call('SADD', KEY .. 'models', row.model)
end

-- A row as it is answered.
local function row_of(id)
  return redis.call('HMGET', KEY .. 'session:' .. id, 'model', 'state_epoch', 'position', 'holder', 'until',
    'request_id', 'blob', 'checkpoints', 'epoch')
end

local function ended(session)
  if session.is_ended then
    return {session.reason, session.request_id, whole(session.position)}
  end
  return {'', '', whole(session.position)}
end

local function take_row()
  return {
    model = take(), epoch = take(), position = take(), holder = take(), expires_at = take(), request_id = take(),
    blob = take(), has_checkpoints = take() == '1', checkpoints = take(),
  }
end

local function take_claim()
  local claim = {
    id = take(), has_model = take() == '1', model = take(), mode = take(), holder = take(),
    epoch = tonumber(take()), is_resident = take() == '1', token = take(),
  }
  if take() == '1' then
    claim.created = take_row()
  end
  return claim
end

-- What a claim would come to.
local function judge(claim)
  local session = read(claim.id)
  local creates = claim.created and (claim.mode == 'create' or claim.mode == 'attach_or_create')
  if not session or not session.is_living then
    if creates then
      return 'created', session
    end
    return session and 'ended' or 'missing', session
  end
  local is_mine = session.replica == replica
  if creates and is_mine and session.token == claim.token then
    return 'created', session -- this very claim made it before
  end
  if claim.mode == 'create' or (claim.has_model and session.model ~= claim.model) then
    return 'exists', session
  end
  if claim.mode == 'resume' and session.holder ~= claim.holder then
    return 'moved', session
  end
  return is_mine and 'kept' or 'taken', session
end

local function create(claim, session)
  if session and session.is_living then
    return session.epoch
  end
  local row = claim.created
  local epoch = math.max(1, tonumber(row.epoch), claim.epoch, session and session.epoch + 1 or 0)
  put(claim.id, row, epoch, claim.holder == '' and row.holder or claim.holder, claim.token)
  return epoch
end

local function do_claim(claim, result, session)
  if result == 'created' then
    return {result, whole(create(claim, session)), false, false}
  elseif result == 'missing' then
    return {result, '0', false, false}
  elseif result == 'ended' then
    return {result, '0', false, ended(session)}
  elseif result == 'moved' then
    return {result, whole(session.epoch), false, false}
  end
  local epoch = session.epoch
  if result ~= 'exists' then
    epoch = math.max(epoch + 1, claim.epoch)
    redis.call('HSET', KEY .. 'session:' .. claim.id, 'epoch', whole(epoch), 'replica', replica,
      'holder', claim.holder == '' and session.holder or claim.holder)
    if result == 'taken' then
      redis.call('PUBLISH', KEY .. 'moved:' .. session.replica, whole(epoch) .. ' ' .. claim.id)
    elseif claim.is_resident then
      return {result, whole(epoch), false, false}
    end
  end
  return {result, whole(epoch), row_of(claim.id), false}
end

local function claim()
  local claim = take_claim()
  return do_claim(claim, judge(claim))
end

local function claim_all()
  local claims, succeeds = {}, true
  for index = 1, tonumber(take()) do
    local claim = take_claim()
    local result, session = judge(claim)
    claims[index] = {claim = claim, result = result, session = session}
    claims[index].succeeds = result == 'created' or result == 'taken' or result == 'kept'
    succeeds = succeeds and claims[index].succeeds
  end
  local answers = {}
  for index, judged in ipairs(claims) do
    if succeeds or not judged.succeeds then
      answers[index] = do_claim(judged.claim, judged.result, judged.session)
    else
      answers[index] = {'undone', '0', false, false}
    end
  end
  return answers
end

local function save()
  local id, row = take(), take_row()
  local session = read(id)
  if not session then
    put(id, row, tonumber(row.epoch), row.holder, '')
    return 'written'
  end
  if session.replica ~= replica or session.is_ended then
    return 'fenced'
  end
  local epoch, position = tonumber(row.epoch), tonumber(row.position)
  if epoch < session.state_epoch or (epoch == session.state_epoch and position < session.position) then
    return 'older'
  end
  local key = KEY .. 'session:' .. id
  redis.call('HSET', key, 'epoch', whole(math.max(session.epoch, epoch)), 'state_epoch', row.epoch,
    'position', row.position, 'holder', row.holder, 'request_id', row.request_id, 'until', row.expires_at,
    'blob', row.blob)
  if row.has_checkpoints then
    redis.call('HSET', key, 'checkpoints', row.checkpoints)
  end
  keep_until(key, tonumber(row.expires_at) + memory_seconds)
  redis.call('ZADD', KEY .. 'expiry:' .. session.model, row.expires_at, id)
  return 'written'
end

local function end_session()
  local id, reason, request_id, position, forget_at = take(), take(), take(), take(), take()
  local session = read(id)
  if session and session.replica ~= replica then
    return 'fenced'
  end
  if session and session.is_ended then
    local is_repeat = session.reason == reason and session.request_id == request_id
      and session.position == tonumber(position)
    return is_repeat and 'written' or 'fenced'
  end
  local key = KEY .. 'session:' .. id
  local model = redis.call('HGET', key, 'model')
  if model then
    unlist(id, model)
  end
  redis.call('DEL', key)
  redis.call('HSET', key, 'model', session and session.model or '', 'epoch', whole(session and session.epoch or 0),
    'state_epoch', '0', 'position', position, 'replica', replica, 'holder', '0', 'token', '',
    'request_id', request_id, 'reason', reason, 'until', forget_at)
  keep_until(key, tonumber(forget_at))
  return 'written'
end

local function load()
  local id = take()
  local session = read(id)
  if not session then
    return {false, false}
  elseif session.is_living then
    return {row_of(id), false}
  end
  return {false, ended(session)}
end

local function list()
  local model, after, limit = take(), take(), tonumber(take())
  local rows, from = {}, after == '' and '-' or '(' .. after
  while #rows < limit do
    local ids = redis.call('ZRANGEBYLEX', KEY .. 'ids:' .. model, from, '+', 'LIMIT', 0, limit)
    for _, id in ipairs(ids) do
      local session = read(id)
      if session and session.is_living and (model == '' or session.model == model) and #rows < limit then
        rows[#rows + 1] = {id, row_of(id)}
      end
      from = '(' .. id
    end
    if #ids < limit then
      break
    end
  end
  local total = 0
  for _, one in ipairs(model == '' and redis.call('SMEMBERS', KEY .. 'models') or {model}) do
    total = total + redis.call('ZCOUNT', KEY .. 'expiry:' .. one, '(' .. ARGV[4], '+inf')
  end
  return {rows, total}
end

local function forget()
  for _, model in ipairs(redis.call('SMEMBERS', KEY .. 'models')) do
    local expired = redis.call('ZRANGEBYSCORE', KEY .. 'expiry:' .. model, '-inf', ARGV[5], 'LIMIT', 0, max_forgotten)
    for _, id in ipairs(expired) do
      local found = redis.call('HMGET', KEY .. 'session:' .. id, 'model', 'reason')
      if found[1] == model and found[2] == '' then
        redis.call('DEL', KEY .. 'session:' .. id)
      end
      -- It may have vanished, and been made anew with another model or ended.
      if found[1] == model or found[2] ~= '' then
        redis.call('ZREM', KEY .. 'ids:', id)
      end
      redis.call('ZREM', KEY .. 'ids:' .. model, id)
      redis.call('ZREM', KEY .. 'expiry:' .. model, id)
    end
    if redis.call('EXISTS', KEY .. 'expiry:' .. model) == 0 then
      redis.call('SREM', KEY .. 'models', model)
    end
  end
end

-- A batch that its sender gave up, and has sent again since, may still be on its way.
local key = KEY .. 'batch:' .. writer
local latest = redis.call('GET', key)
if latest and tonumber(latest) >= number then
  return redis.error_reply('STALE this batch was given up')
end
redis.call('SET', key, number, 'EX', BATCH_SECONDS)

local DO = {S = save, C = claim, A = claim_all, E = end_session, L = load, R = list}
local answers, last = {}, #ARGV
while place < last do
  answers[#answers + 1] = DO[take()]()
end
if max_forgotten > 0 then
  forget()
end
return answers
