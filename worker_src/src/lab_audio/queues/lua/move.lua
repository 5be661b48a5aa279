-- MOVE: hand a job to another list, if it is still ours.  KEYS: its list, the other.  ARGV: job, 'head' or 'tail'.
if redis.call('LREM', KEYS[1], 0, ARGV[1]) == 0 then
    return 0
end
redis.call(ARGV[2] == 'head' and 'LPUSH' or 'RPUSH', KEYS[2], ARGV[1])
return 1
